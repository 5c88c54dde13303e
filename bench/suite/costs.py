"""The fewest bytes that a call of an op moves, and the floating-point operations it makes, from shapes alone.

Bytes are weights, keys and values, inputs and outputs once each; `bench.traffic` counts what the kernels really move.
A multiplication and an addition are two operations; of the functions that are not products, every arithmetic
instruction on an element counts one, which is enough to see that they are bound by bytes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dia_kernels.reference import PackedWeight


class Cost(NamedTuple):
    """Of one call."""

    bytes: int
    operations: int


def cost(op: str, a: Mapping[str, Any], context: int, text: int = 256) -> Cost:
    """Return the cost of an op.

    a: its arguments by name, on any device; context: tokens that self-attention reads, the new one included;
    text: tokens that cross-attention reads.
    """
    return _COSTS[op](a, context, text)


def _size(a: Mapping[str, Any], *names: str) -> int:
    return sum(a[name].nbytes for name in names if isinstance(a.get(name), Tensor | PackedWeight))


def _projection(*names: str) -> Callable[[Mapping[str, Any], int, int], Cost]:
    def of(a: Mapping[str, Any], context: int, text: int) -> Cost:
        return Cost(_size(a, "x", "norm_weight", "weight", *names), 2 * a["x"].shape[0] * a["weight"].shape.numel())

    return of


def _elementwise(operations: int, *names: str) -> Callable[[Mapping[str, Any], int, int], Cost]:
    """operations: for each element of the first tensor named."""

    def of(a: Mapping[str, Any], context: int, text: int) -> Cost:
        return Cost(_size(a, *names), operations * a[names[0]].numel())

    return of


def _linear_residual(a: Mapping[str, Any], context: int, text: int) -> Cost:
    moved = _size(a, "x", "weight", "constant") + 2 * _size(a, "residual")
    return Cost(moved, 2 * a["x"].shape[0] * a["weight"].shape.numel())


def _rope_attention(a: Mapping[str, Any], context: int, text: int) -> Cost:
    rows = a["qkv"].shape[0]
    _, kv_heads, _, head_dim = a["k_pages"].shape
    cached = 2 * context * rows * kv_heads * head_dim * a["k_pages"].itemsize
    return Cost(_size(a, "qkv", "out") + cached, 4 * context * a["out"].numel())


def _cross_attention(a: Mapping[str, Any], context: int, text: int) -> Cost:
    _, kv_heads, _, head_dim = a["k_pages"].shape
    cached = 2 * text * a["q"].shape[0] * kv_heads * head_dim * a["k_pages"].itemsize
    return Cost(_size(a, "q", "out") + cached, 4 * text * a["q"].numel())


def _ragged_attention(a: Mapping[str, Any], context: int, text: int) -> Cost:
    q, k = a["q"], a["k"]
    if a.get("block_table") is not None:  # k: [pages, kv_heads, page_size, head_dim]
        kv_tokens, pairs = context, q.shape[0] * context
        cached = 2 * kv_tokens * k.shape[1] * k.shape[3] * k.itemsize
    else:
        sequences = a["starts"].shape[0] - 1
        each = q.shape[0] // sequences
        pairs = sequences * (each * (each + 1) // 2 if a["causal"] else each * each)
        cached = 2 * k.numel() * k.itemsize
    return Cost(2 * q.numel() * q.itemsize + cached, 4 * pairs * q.shape[1] * q.shape[2])


def _rope(a: Mapping[str, Any], context: int, text: int) -> Cost:
    qkv, kv_heads, dim = a["qkv"], a["kv_heads"], 2 * a["cos"].shape[1]
    turned = qkv.shape[0] * (qkv.shape[1] // dim - kv_heads) * dim
    stored = qkv.shape[0] * kv_heads * dim if a.get("slot_mapping") is not None else 0
    return Cost((2 * turned + 3 * stored) * qkv.itemsize, 3 * turned)  # v is read and stored, k is stored once more


def _embed_codes(a: Mapping[str, Any], context: int, text: int) -> Cost:
    batch, channels = a["sampled"].shape
    hidden = a["table"].shape[1]
    looked_up = batch * channels * hidden * a["table"].itemsize
    return Cost(looked_up + _size(a, "x", "sampled"), batch * channels * hidden)


_COSTS: dict[str, Callable[[Mapping[str, Any], int, int], Cost]] = {
    "rms_norm": _elementwise(4, "x", "weight", "out"),
    "glu": _elementwise(3, "x", "out"),
    "rms_norm_linear": _projection("out"),
    "rms_norm_glu": _projection("out"),
    "codebook_logits": _projection("out"),
    "linear_residual": _linear_residual,
    "rope_attention": _rope_attention,
    "cross_attention": _cross_attention,
    "ragged_attention": _ragged_attention,
    "rope": _rope,
    "embed_codes": _embed_codes,
    "sample": _elementwise(8, "logits", "out"),
    "snake": _elementwise(5, "x", "alpha", "out"),
    "snake_residual": _elementwise(6, "x", "residual", "alpha", "total", "out"),
}
