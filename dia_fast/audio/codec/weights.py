"""Codec files: reads the transformers layout (a folder) and descript-audio-codec's (a .pth file), writes the former."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dia_fast.audio.codec.config import CodecConfig
from dia_fast.checkpoint.tensor_io import check_stored, load_pickle, open_tensors, save_safetensors
from dia_fast.errors import CheckpointError, InputError
from dia_fast.utils.files import read_json, replacing

CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"

# How weight norm's magnitude and direction are called: by torch.nn.utils.weight_norm, and by its parametrization.
_WEIGHT_NORM = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)

_UNIT = {"block.0": "snake1", "block.1": "conv1", "block.2": "snake2", "block.3": "conv2"}


def read_codec_files(path: Path) -> tuple[CodecConfig, dict[str, Tensor]]:
    """Read a folder in the transformers layout, a descript-audio-codec file, or a folder that holds one such file.

    Returns the configuration and the tensors under their transformers names, weight norm folded, as on disk otherwise.
    Raises CheckpointError naming the file and what is wrong with it.
    """
    if path.is_file():
        return _read_official(path)
    if (path / CONFIG).is_file():
        return _read_transformers(path)
    official = sorted(path.glob("*.pth"))
    if len(official) == 1:
        return _read_official(official[0])
    raise CheckpointError(
        f"{path}: no codec here: expected {CONFIG} and {WEIGHTS} (as in descript/dac_44khz), or one .pth file of "
        "descript-audio-codec"
    )


def _read_transformers(folder: Path) -> tuple[CodecConfig, dict[str, Tensor]]:
    preprocessor = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else None
    contents = read_json(folder / CONFIG)
    try:
        config = CodecConfig.from_transformers(contents, preprocessor)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; it holds the codec's weights")
    open_tensors(path)  # says what is wrong with the file
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    return config, fold_weight_norm(tensors, path)


def _read_official(path: Path) -> tuple[CodecConfig, dict[str, Tensor]]:
    contents = load_pickle(path)
    metadata = contents.get("metadata") if isinstance(contents, Mapping) else None
    tensors = contents.get("state_dict") if isinstance(contents, Mapping) else None
    if not isinstance(metadata, Mapping) or not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: not a descript-audio-codec file: it has no 'state_dict' and 'metadata'")
    try:
        config = CodecConfig.from_official(metadata.get("kwargs"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_stored(tensors, path)
    return config, fold_weight_norm(rename_official(tensors, config), path)


def rename_official(tensors: Mapping[str, Any], config: CodecConfig) -> dict[str, Tensor]:
    """The transformers names for descript-audio-codec's; a name that the network does not have is kept as it is."""
    prefixes = {"encoder.block.0": "encoder.conv1", "decoder.model.0": "decoder.conv1"}
    depth = len(config.downsampling_ratios)
    for block in range(depth):
        old, new = f"encoder.block.{block + 1}", f"encoder.block.{block}"
        for unit in range(3):
            prefixes |= _unit_prefixes(f"{old}.block.{unit}", f"{new}.res_unit{unit + 1}")
        prefixes |= {f"{old}.block.3": f"{new}.snake1", f"{old}.block.4": f"{new}.conv1"}
    prefixes |= {f"encoder.block.{depth + 1}": "encoder.snake1", f"encoder.block.{depth + 2}": "encoder.conv2"}
    depth = len(config.upsampling_ratios)
    for block in range(depth):
        old, new = f"decoder.model.{block + 1}", f"decoder.block.{block}"
        prefixes |= {f"{old}.block.0": f"{new}.snake1", f"{old}.block.1": f"{new}.conv_t1"}
        for unit in range(3):
            prefixes |= _unit_prefixes(f"{old}.block.{unit + 2}", f"{new}.res_unit{unit + 1}")
    prefixes |= {f"decoder.model.{depth + 1}": "decoder.snake1", f"decoder.model.{depth + 2}": "decoder.conv2"}

    renamed = {}
    for name, tensor in tensors.items():
        prefix, dot, parameter = str(name).rpartition(".")
        if prefix.endswith(".parametrizations.weight"):
            prefix, dot, parameter = (
                prefix.removesuffix(".parametrizations.weight"),
                ".parametrizations.weight.",
                parameter,
            )
        renamed[prefixes.get(prefix, prefix) + dot + parameter] = tensor
    return renamed


def _unit_prefixes(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{place}": f"{new}.{name}" for place, name in _UNIT.items()}


def fold_weight_norm(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Replace each pair of magnitude g and direction v by `weight = g * v / |v|`, norms over all but the first axis.

    Computed in fp64 and rounded once. Raises CheckpointError if half a pair is missing or the halves do not fit.
    """
    folded = dict(tensors)
    for magnitude, direction in _WEIGHT_NORM:
        stems = {name.removesuffix(end) for name in tensors for end in (magnitude, direction) if name.endswith(end)}
        for stem in sorted(stems):
            for end in (magnitude, direction):
                if not isinstance(folded.get(stem + end), Tensor):
                    raise CheckpointError(f"{source}: tensor {stem + end} is missing; weight norm needs it")
            g, v = folded.pop(stem + magnitude), folded.pop(stem + direction)
            if v.dim() < 2 or g.numel() != v.shape[0] or not (g.is_floating_point() and v.is_floating_point()):
                raise CheckpointError(
                    f"{source}: {stem + magnitude} of shape {list(g.shape)} does not fit {stem + direction} of shape "
                    f"{list(v.shape)}"
                )
            wide = v.double()
            norm = wide.flatten(1).norm(dim=1)
            scale = (g.double().flatten() / norm).reshape(-1, *[1] * (v.dim() - 1))
            folded[stem + ".weight"] = (wide * scale).to(v.dtype)
    return folded


def check_tensors(tensors: Mapping[str, Any], shapes: Mapping[str, torch.Size], source: str) -> None:
    """Raise CheckpointError unless the names, shapes and values are exactly what the network needs."""
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing:
        raise CheckpointError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if extra:
        raise CheckpointError(f"{source}: {len(extra)} tensors are not part of the codec, the first is {extra[0]}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{source}: {name} is {found}; the configuration needs shape {list(shape)}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"{source}: {name} ({tensor.dtype}) is not made of finite floating point numbers")


def write_transformers(folder: str | os.PathLike[str], config: CodecConfig, tensors: Mapping[str, Tensor]) -> Path:
    """Write the three files of the transformers layout, each complete or not at all; the configuration comes last."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    with replacing(folder / WEIGHTS) as temporary:
        save_safetensors(tensors, temporary)
    for name, contents in ((PREPROCESSOR, config.to_preprocessor()), (CONFIG, config.to_transformers())):
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder
