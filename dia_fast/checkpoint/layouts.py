"""The two official layouts of a checkpoint, as parts within the fused weights.

| original (`DenseGeneral`: input axes first) | transformers (`nn.Linear`: output first) |
|---|---|
| `encoder.embedding.weight` | `model.encoder.embedding.weight` |
| `*.{self,cross}_attention.{q,k,v}_proj.weight` `[in, heads, head_dim]` | `model.*` + same `[heads * head_dim, in]` |
| `*.{self,cross}_attention.o_proj.weight` `[heads, head_dim, out]` | `model.*` + same `[out, heads * head_dim]` |
| `*.mlp.wi_fused.weight` `[in, 2, F]` | `model.*.mlp.gate_up_proj.weight` `[2 * F, in]` |
| `*.mlp.wo.weight` `[F, out]` | `model.*.mlp.down_proj.weight` `[out, F]` |
| `decoder.embeddings.{channel}.weight` | `model.decoder.embeddings.embed.weight`, the channels one after another |
| `decoder.logits_dense.weight` `[in, channels, vocab]` | `logits_dense.weight` `[channels * vocab, in]` |
| norms | `model.` + same |
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from dia_fast.errors import CheckpointError
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, fused_slices

# Buffers that follow from the configuration; some versions store them, none needs them.
_DERIVED = (".offsets", ".inv_freq", ".original_inv_freq", ".timescale")

_WRAPPED = re.compile(r"^(?:_orig_mod\.|module\.)+")

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSlice:
    """One tensor of a layout: rows `first` to `last` (exclusive) of the fused weight `fused`.

    Args:
        shape: As stored.
        transposed: The stored tensor, its axes merged to `[in, out]`, is the transpose of those rows.
    """

    fused: str
    first: int
    last: int
    shape: tuple[int, ...]
    transposed: bool = False


def tensor_slices(config: DiaConfig, layout: str) -> dict[str, TensorSlice]:
    """Every tensor of a layout ("transformers" or "original") by name; together they cover each fused row once."""
    shapes = fused_shapes(config)
    found: dict[str, TensorSlice] = {}
    for name, (fused, first, last) in fused_slices(config).items():
        part = TensorSlice(fused, first, last, (last - first, *shapes[fused][1:]))
        found |= {name: part} if layout == "transformers" else _original(config, name, part)
    return found


def detect_layout(names: Iterable[str]) -> str:
    """Tell the layouts apart by the names of the tensors.

    Raises:
        CheckpointError: If they are of neither.
    """
    names = list(names)
    if any(name.startswith("model.") or name == "logits_dense.weight" for name in names):
        return "transformers"
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        return "original"
    some = ", ".join(sorted(names)[:3]) or "none at all"
    raise CheckpointError(f"the tensors are not those of Dia in either official layout; the first are: {some}")


def plain_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors by their names in a layout, without what torch.compile and DistributedDataParallel put in front.

    Raises:
        CheckpointError: For two tensors that have the same name then.
    """
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        plain = _WRAPPED.sub("", name)
        if plain in found:
            raise CheckpointError(f"tensor {plain} is there twice, as {name} and under another prefix")
        found[plain] = tensor
    return found


def is_derived(name: str) -> bool:
    """Tell whether a tensor is a buffer that the configuration determines, so that it may be there or not."""
    return name.endswith(_DERIVED)


def _original(config: DiaConfig, full_name: str, part: TensorSlice) -> dict[str, TensorSlice]:
    decoder = config.decoder
    name = full_name.removeprefix("model.")
    stack = config.encoder if name.startswith("encoder.") else decoder
    rows, columns = part.last - part.first, part.shape[-1]
    shape: tuple[int, ...]
    if name == "decoder.embeddings.embed.weight":
        size = decoder.vocab_size
        return {
            f"decoder.embeddings.{channel}.weight": TensorSlice(
                part.fused, channel * size, (channel + 1) * size, (size, columns)
            )
            for channel in range(decoder.num_channels)
        }
    if name == "logits_dense.weight":
        name, shape = "decoder.logits_dense.weight", (columns, decoder.num_channels, decoder.vocab_size)
    elif "_attention." in name:
        head_dim = decoder.cross_head_dim if "cross_attention" in name else stack.head_dim
        shape = (columns // head_dim, head_dim, rows) if "o_proj" in name else (columns, rows // head_dim, head_dim)
    elif "gate_up_proj" in name:
        name, shape = name.replace("gate_up_proj", "wi_fused"), (columns, 2, stack.intermediate_size)
    elif "down_proj" in name:
        name, shape = name.replace("down_proj", "wo"), (columns, rows)
    else:
        return {name: part}
    return {name: TensorSlice(part.fused, part.first, part.last, shape, transposed=True)}
