"""Write checkpoints: `save_pretrained` in the transformers layout, and conversion between the two official layouts.

Weights are written one fused tensor at a time into a folder beside the destination, which takes its name only when it
is complete: whatever goes wrong, the destination is either whole or not there.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dia_fast.audio.codec import codec_beside
from dia_fast.checkpoint.layouts import TensorSlice, tensor_slices
from dia_fast.checkpoint.loading import DTYPES, not_finite, open_checkpoint
from dia_fast.checkpoint.tensor_io import SAFETENSORS_DTYPES, save_torch
from dia_fast.errors import CheckpointError, InputError, shown
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, parameter_count
from dia_fast.model.quantization import FLOAT, check_weights, is_table, quantized_names
from dia_fast.utils.ambient import isolated
from dia_fast.utils.files import checked_path, replacing_folder
from dia_kernels.reference.quantized import Int8Weight

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    name: str
    part: TensorSlice
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return torch.Size(self.part.shape).numel() * self.dtype.itemsize


def save_pretrained(
    folder: str | Path,
    config: DiaConfig,
    weights: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    defaults: SamplingParams | None = None,
) -> Path:
    """Write fused weights as a checkpoint that transformers loads; return its folder.

    One of the first generation is written as the original package of its time loads it.

    Args:
        folder: A new or an empty one.
        config: Of the model.
        weights: By fused name, on any device, floating point. They are written in their own dtype.
        max_shard_bytes: Of a file; a larger tensor gets its own.
        defaults: Sampling parameters, for generation_config.json.

    Raises:
        CheckpointError: If a weight is missing or misshapen, if the folder is not empty, or if writing fails; then
            nothing is left behind.
    """
    for name, shape in fused_shapes(config).items():
        if name not in weights:
            raise CheckpointError(f"weight {name} is missing, so the model cannot be saved")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"weight {name} has shape {list(weights[name].shape)}; expected {list(shape)}")
    dtypes = {name: tensor.dtype for name, tensor in weights.items()}

    def fetch(name: str) -> Tensor:
        return weights[name].detach().cpu()

    layout = "original" if config.first_generation else "transformers"
    limit = None if config.first_generation else max_shard_bytes
    return write_checkpoint(folder, config, dtypes, fetch, layout=layout, max_shard_bytes=limit, defaults=defaults)


def convert(
    source: str | Path,
    destination: str | Path,
    layout: str = "transformers",
    *,
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    pickled: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Rewrite a checkpoint in the "transformers" or the "original" layout, from whichever it has; returns the folder.

    dtype: of the written weights; None keeps what is stored. weights: the matrices to write in 8 bits, of
    `quantization.WEIGHTS`, in the transformers layout alone; None keeps what is stored (original layout: none).
    The original layout is one `model.safetensors`, or, if `pickled`, one `pytorch_model.bin`, built in memory.
    A folder `codec` beside the source comes along. Values are exact unless `dtype` is narrower or `weights` rounds.
    Raises CheckpointError as `open_checkpoint` and `save_pretrained` do.
    """
    if not isinstance(layout, str) or layout not in ("transformers", "original"):
        raise InputError(f"layout {shown(layout)} is unknown; 'transformers' and 'original' can be written")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in DTYPES):
        raise InputError(f"weights cannot be written as {shown(dtype)}; float32, float16 and bfloat16 can")
    check_weights(weights)
    if not isinstance(pickled, bool):
        raise InputError(f"pickled must be True or False, not {shown(pickled)}")
    if pickled and layout != "original":
        raise InputError("only the original layout can be written as a pickle")
    checkpoint = open_checkpoint(source, revision=revision, local_files_only=local_files_only)
    weights = weights or (checkpoint.weights if layout == "transformers" else FLOAT)
    if weights != FLOAT and (layout != "transformers" or checkpoint.config.first_generation):
        raise InputError(f"weights in 8 bits ({weights}) can be written in the transformers layout alone")
    dtypes = {name: dtype or checkpoint.stored_dtype(name) for name in fused_shapes(checkpoint.config)}
    dtypes |= dict.fromkeys(quantized_names(checkpoint.config, weights), torch.int8)

    def fetch(name: str) -> Tensor | Int8Weight:
        return checkpoint.load_int8(name) if dtypes[name] is torch.int8 else checkpoint.load_fused(name, dtypes[name])

    limit = max_shard_bytes if layout == "transformers" else None
    return write_checkpoint(
        destination,
        checkpoint.config,
        dtypes,
        fetch,
        layout=layout,
        max_shard_bytes=limit,
        pickled=pickled,
        defaults=checkpoint.defaults,
        codec=codec_beside(source),
    )


@isolated()
def write_checkpoint(
    folder: str | Path,
    config: DiaConfig,
    dtypes: Mapping[str, torch.dtype],
    fetch: Callable[[str], Tensor | Int8Weight],
    *,
    layout: str = "transformers",
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    pickled: bool = False,
    defaults: SamplingParams | None = None,
    codec: Path | None = None,
) -> Path:
    """Write a checkpoint whose weights are made or read one by one; returns the folder.

    Args:
        dtypes: Of every fused weight by name.
        fetch: Called with such a name, maybe twice; returns the fused weight, on the CPU, in that dtype.
        codec: A folder that is copied along. Otherwise as `save_pretrained` and `convert`.
    """
    folder = checked_path(folder, "folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder; name a new one, nothing is overwritten")
    # Where dtypes differ, wide ones first: every tensor then starts at a multiple of its item size.
    order = {name: i for i, name in enumerate(fused_shapes(config))}
    entries = [_Entry(name, part, dtypes[part.fused]) for name, part in tensor_slices(config, layout).items()]
    entries += [
        _Entry(f"{entry.name}_scale", replace(entry.part, shape=(entry.part.shape[0], 1)), torch.float32)
        for entry in entries
        if entry.dtype is torch.int8
    ]
    entries.sort(key=lambda entry: (-entry.dtype.itemsize, order[entry.part.fused], entry.part.first))
    with replacing_folder(folder, CheckpointError, called="the checkpoint ") as partial:
        if pickled:
            _save_pickle({entry.name: tensor for entry, tensor in _cut(entries, fetch)}, partial / "pytorch_model.bin")
        else:
            _write_shards(partial, config, entries, fetch, max_shard_bytes)
        for name, content in _metadata(config, layout, entries, defaults or SamplingParams()).items():
            _write_json(partial / name, content)
        if codec is not None:
            shutil.copytree(codec, partial / "codec")
    return folder


def _write_shards(
    folder: Path,
    config: DiaConfig,
    entries: list[_Entry],
    fetch: Callable[[str], Tensor | Int8Weight],
    max_shard_bytes: int | None,
) -> None:
    shards: list[list[_Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and max_shard_bytes is not None and filled + entry.size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", shards[0], fetch)
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard, fetch)
    index = {
        "metadata": {
            "total_size": sum(entry.size for entry in entries),
            "total_parameters": parameter_count(config),
        },
        "weight_map": {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, entries: list[_Entry], fetch: Callable[[str], Tensor | Int8Weight]) -> None:
    """https://github.com/huggingface/safetensors#format, tensor after tensor without holding them all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.part.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in _cut(entries, fetch):
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _save_pickle(state: dict[str, Tensor], path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        save_torch(state, file)


def _cut(entries: list[_Entry], fetch: Callable[[str], Tensor | Int8Weight]) -> Iterator[tuple[_Entry, Tensor]]:
    """Each entry's tensor, contiguous, cut from the fused weight that holds it (entries come grouped by it)."""
    for fused, group in itertools.groupby(entries, key=lambda entry: entry.part.fused):
        fetched = fetch(fused)
        if isinstance(fetched, Tensor) and (wrong := not_finite(fetched)):
            raise CheckpointError(
                f"weight {fused} cannot be written: {wrong} of its {fetched.numel()} values are NaN or infinity"
            )
        for entry in group:
            if isinstance(fetched, Tensor):
                weight = fetched
            else:
                weight = fetched.values if entry.dtype is torch.int8 else fetched.scales
            rows = weight[entry.part.first : entry.part.last]
            yield entry, (rows.T if entry.part.transposed else rows).contiguous().view(entry.part.shape)


def _metadata(
    config: DiaConfig, layout: str, entries: list[_Entry], defaults: SamplingParams
) -> dict[str, dict[str, Any]]:
    floating = [entry for entry in entries if entry.dtype is not torch.int8 and not entry.name.endswith("_scale")]
    dtype = str(max((entry.dtype for entry in floating), key=lambda d: sum(e.size for e in floating if e.dtype is d)))
    dtype = dtype.removeprefix("torch.")
    if layout == "original":
        return {"config.json": config.to_original() | ({} if config.first_generation else {"torch_dtype": dtype})}
    decoder = config.decoder
    generation = {
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": decoder.eos_token_id,
        "pad_token_id": decoder.pad_token_id,
        "do_sample": defaults.do_sample,
        "guidance_scale": defaults.guidance_scale,
        "max_length": decoder.max_position_embeddings,
        "temperature": defaults.temperature,
        "top_k": defaults.top_k or 0,  # transformers' "all"
        "top_p": defaults.top_p,
    }
    quantized = [entry.name.removesuffix(".weight") for entry in entries if entry.dtype is torch.int8]
    described = {"quantization_config": _quantization(config, quantized)} if quantized else {}
    return {
        "config.json": config.to_transformers() | {"dtype": dtype} | described,
        "generation_config.json": generation,
    }


def _quantization(config: DiaConfig, quantized: list[str]) -> dict[str, Any]:
    """The entry of config.json by which compressed-tensors reads such a file.

    Source: https://github.com/neuralmagic/compressed-tensors, format `int-quantized`.
    """
    linear = [name.removesuffix(".weight") for name, part in tensor_slices(config, "transformers").items()
              if len(part.shape) == 2 and not is_table(part.fused)]  # fmt: skip
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": sorted(set(linear) - set(quantized)),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
