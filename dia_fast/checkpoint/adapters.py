"""LoRA adapters in the layout of the PEFT library: a folder that names its base, merged into it while it loads.

`dia_fast.training.lora` writes them; here they are read.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dia_fast.checkpoint.tensor_io import StoredTensor, open_tensors
from dia_fast.errors import CheckpointError
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, fused_slices
from dia_fast.utils.files import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What changes the formula, and is not computed here.
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


@dataclass(frozen=True)
class Part:
    """The adapter of some rows of a fused weight: `weight[first:last] += scale * b @ a`."""

    first: int
    last: int
    a: StoredTensor  # [rank, in]
    b: StoredTensor  # [last - first, rank]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter; its weights are still in the file.

    Args:
        parts: By fused name.
    """

    folder: Path
    scale: float
    parts: dict[str, list[Part]]

    def merged(self, fused: str, weight: Tensor) -> Tensor:
        """The fused weight on the CPU with the adapter in it, in its own dtype. Sums in float32."""
        if fused not in self.parts:
            return weight
        change = torch.zeros(weight.shape, dtype=torch.float32, device="cpu")
        read = [(part.first, part.last, _values(part.a), _values(part.b)) for part in self.parts[fused]]
        if len(read) > 1 and all(torch.equal(read[0][2], a) for _, _, a, _ in read):
            # Parts that share `a` were trained as one: one product gives the bits that training has.
            read = [(read[0][0], read[-1][1], read[0][2], torch.cat([b for _, _, _, b in read]))]
        for first, last, a, b in read:
            change[first:last] = (b @ a) * self.scale
        return (weight.float() + change).to(weight.dtype)


def is_adapter(folder: Path) -> bool:
    """True for a folder with an adapter and no model of its own."""
    return os.path.isfile(folder / CONFIG) and not os.path.exists(folder / "config.json")


def base_of(folder: Path) -> str:
    """The model that an adapter belongs to: a name, or a path, relative ones from here or from the adapter's folder.

    Raises:
        CheckpointError: If it is not recorded.
    """
    base = _read_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / CONFIG} names no base_model_name_or_path: write there what it was trained on")
    beside = folder / base
    return str(beside) if not os.path.exists(os.path.expanduser(base)) and os.path.exists(beside) else base


def open_adapter(folder: Path, config: DiaConfig) -> Adapter:
    """Check an adapter against the configuration of its base.

    Raises:
        CheckpointError: For what is not computed here.
    """
    adapter_config = _read_config(folder)
    where = folder / CONFIG
    if adapter_config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {adapter_config.get('peft_type')!r}; only LORA adapters can be loaded"
        )
    if wrong := [name for name in _UNSUPPORTED if adapter_config.get(name)]:
        raise CheckpointError(
            f"{where}: {wrong[0]} is {adapter_config[wrong[0]]!r}, which is not supported; merge the adapter with PEFT"
        )
    if adapter_config.get("bias", "none") != "none":
        raise CheckpointError(f"{where}: bias is {adapter_config['bias']!r}; only 'none' is supported")
    rank: Any = adapter_config.get("r")
    alpha: Any = adapter_config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{where}: r must be a whole number and lora_alpha a number, not {rank!r} and {alpha!r}")
    scale = alpha / (math.sqrt(rank) if adapter_config.get("use_rslora") else rank)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    return Adapter(folder, scale, _parts(open_tensors(folder / WEIGHTS), config, rank, folder / WEIGHTS))


def _parts(tensors: dict[str, StoredTensor], config: DiaConfig, rank: int, where: Path) -> dict[str, list[Part]]:
    left, shapes = dict(tensors), fused_shapes(config)
    found: dict[str, list[Part]] = {}
    for tensor, (fused, first, last) in fused_slices(config).items():
        name = _PREFIX + tensor.removesuffix(".weight")
        a, b = left.pop(f"{name}.lora_A.weight", None), left.pop(f"{name}.lora_B.weight", None)
        if a is None and b is None:
            continue
        wanted = [(rank, shapes[fused][-1]), (last - first, rank)]
        if a is None or b is None or len(shapes[fused]) != 2 or [tuple(a.shape), tuple(b.shape)] != wanted:
            shown = [None if item is None else list(item.shape) for item in (a, b)]
            raise CheckpointError(
                f"{where}: the adapter of {tensor} has shapes {shown[0]} and {shown[1]}; the base asks for "
                f"{list(wanted[0])} and {list(wanted[1])}"
            )
        found.setdefault(fused, []).append(Part(first, last, a, b))
    if left:
        raise CheckpointError(f"{where}: {next(iter(left))} is no adapter of a weight of the base")
    if not found:
        raise CheckpointError(f"{where} holds no adapter")
    return {fused: sorted(parts, key=lambda part: part.first) for fused, parts in found.items()}


def _values(tensor: StoredTensor) -> Tensor:
    count = torch.Size(tensor.shape).numel()
    return tensor.read(0, count).float().view(tensor.shape).clone()


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    adapter_config = read_json(path)
    if not isinstance(adapter_config, dict):
        raise CheckpointError(f"{path} must be an object of named fields, not {type(adapter_config).__name__}")
    return adapter_config
