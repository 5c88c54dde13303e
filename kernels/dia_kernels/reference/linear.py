"""Projections with what surrounds them: RMSNorm before, SiLU gate or residual after.

Shapes: `rows` activations of width `hidden`; weights are `[out_features, in_features]`, tensors or what `pack` made of
them. What comes out of a packed weight is float32 and rounded once, where it is stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_kernels.reference.packed import PackedWeight

Weight = Tensor | PackedWeight

_BLOCK_BYTES = 4 << 20  # of weights that stay in a CPU's cache while one row after another is multiplied


def _linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`. On a CPU a row's result is the same to the bit whatever the other rows are.

    A matrix product picks its order of summation by the number of rows, so there each row is multiplied by itself.
    What that costs in arithmetic it saves in traffic: for a few rows it is as fast, or faster. 16-bit products are
    taken as they come where there are no instructions for them: torch then forms every entry by itself anyway.
    """
    if isinstance(weight, PackedWeight):
        return weight.linear(x)
    if x.device.type != "cpu" or (x.element_size() == 2 and torch.backends.cpu.get_cpu_capability() == "AVX2"):
        return F.linear(x, weight)
    out = x.new_empty(x.shape[0], weight.shape[0])
    vectors = [row.clone() for row in x.unbind()]  # aligned alike: the order of summation may depend on that too
    step = max(_BLOCK_BYTES // (weight.shape[1] * weight.element_size()), 1)
    for block, results in zip(weight.split(step), out.split(step, 1), strict=True):
        for vector, result in zip(vectors, results.unbind(), strict=True):
            torch.mv(block, vector, out=result)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """`out = x / sqrt(mean(x^2) + eps) * weight`, in fp32, rounded once to `out.dtype`.

    x, out: `[rows, hidden]`; weight: `[hidden]`. Formula: Zhang & Sennrich 2019, with the cast after the weight.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return out.copy_(wide.mul_(scale).mul_(weight.float()) if wide is not x else wide * scale * weight.float())


def _normed_linear(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float) -> Tensor:
    """`rms_norm(x) @ weight.T`; for a packed weight, which takes float32, without rounding in between."""
    dtype = torch.float32 if isinstance(weight, PackedWeight) else x.dtype
    return _linear(rms_norm(x, norm_weight, eps, torch.empty_like(x, dtype=dtype)), weight)


def rms_norm_linear(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """`out = rms_norm(x) @ weight.T`: the QKV projection and the cross-attention query projection.

    x: `[rows, hidden]`; norm_weight: `[hidden]`; weight: `[features, hidden]`; out: `[rows, features]`.
    """
    return out.copy_(_normed_linear(x, norm_weight, weight, eps))


def linear_residual(x: Tensor, weight: Weight, residual: Tensor, constant: Tensor | None = None) -> Tensor:
    """`residual[:m] += x @ weight.T`; rows from `m` on, if any, get `constant` added instead. In place.

    x: `[m, in_features]`; weight: `[hidden, in_features]`; residual: `[rows, hidden]`, `rows >= m`;
    constant: `[hidden]`, required exactly when `rows > m` (the unconditional rows' cross-attention, docs/dia.md).
    """
    m = x.shape[0]
    residual[:m] += _linear(x, weight)
    if residual.shape[0] > m:
        if constant is None:
            raise ValueError(f"constant: needed, residual has {residual.shape[0]} rows and x only {m}")
        residual[m:] += constant
    return residual


def glu(x: Tensor, out: Tensor) -> Tensor:
    """`out = silu(gate) * up` where `gate, up = x.chunk(2, -1)`, in fp32, rounded once.

    x: `[rows, 2 * intermediate]`, gate first; out: `[rows, intermediate]`.
    """
    gate, up = x.float().chunk(2, -1)
    return out.copy_(F.silu(gate) * up)


def rms_norm_glu(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """`out = silu(gate) * up` of `rms_norm(x) @ weight.T`: RMSNorm, gate and up projections, activation.

    x: `[rows, hidden]`; weight: `[2 * intermediate, hidden]`, gate rows first; out: `[rows, intermediate]`.
    """
    return glu(_normed_linear(x, norm_weight, weight, eps), out)


def codebook_logits(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """Final RMSNorm and the heads of all channels: `out = (rms_norm(x) @ weight.T)` as float32.

    x: `[rows, hidden]`; weight: `[channels * vocab, hidden]`; out: `[rows, channels, vocab]` float32, holding
    values rounded to `x.dtype` (docs/dia.md: the head's result is rounded, all that follows is float32).
    """
    return out.copy_(_normed_linear(x, norm_weight, weight, eps).to(x.dtype).view(out.shape))
