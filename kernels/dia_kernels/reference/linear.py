"""Projections with what surrounds them: RMSNorm before, SiLU gate or residual after.

Shapes: `rows` activations of width `hidden`; weights are `[out_features, in_features]`: tensors, in 8 bits
(`quantized`), or in the layout of a CPU's library (`packed`). The product of those is rounded once, where it is stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_kernels.reference.weight import PackedWeight

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
    """Normalise rows: `out = x / sqrt(mean(x^2) + eps) * weight`, in fp32, rounded once to `out.dtype`.

    Formula: Zhang & Sennrich 2019, with the cast after the weight.

    Args:
        x: `[rows, hidden]`, float32, float16 or bfloat16; the last axis contiguous.
        weight: `[hidden]`.
        eps: Added to the mean square.
        out: `[rows, hidden]`, written; the last axis contiguous.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return out.copy_(wide.mul_(scale).mul_(weight.float()) if wide is not x else wide * scale * weight.float())


def _normed_linear(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float) -> Tensor:
    """`rms_norm(x) @ weight.T`; for a packed weight, which takes float32, without rounding in between."""
    dtype = torch.float32 if isinstance(weight, PackedWeight) else x.dtype
    return _linear(rms_norm(x, norm_weight, eps, torch.empty_like(x, dtype=dtype)), weight)


def rms_norm_linear(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """Normalise and project: `out = rms_norm(x) @ weight.T`, for QKV and the query of cross-attention.

    Args:
        x: `[rows, hidden]`, float32, float16 or bfloat16; the kernel takes 1 to 64 rows.
        norm_weight: `[hidden]`.
        weight: `[features, hidden]`, a tensor or what `pack` made of it.
        eps: Added to the mean square.
        out: `[rows, features]`, written.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    return out.copy_(_normed_linear(x, norm_weight, weight, eps))


def linear_residual(x: Tensor, weight: Weight, residual: Tensor, constant: Tensor | None = None) -> Tensor:
    """Project and add in place: `residual[:m] += x @ weight.T`, and `residual[m:] += constant`.

    The sum is formed in fp32 and rounded once.

    Args:
        x: `[m, in_features]`, float32, float16 or bfloat16; the kernel takes `m` from 1 to 64.
        weight: `[hidden, in_features]`, a tensor or what `pack` made of it.
        residual: `[rows, hidden]` with `rows >= m`, added to.
        constant: `[hidden]`, required exactly when `rows > m`: the cross-attention of unconditional rows (docs/dia.md).

    Returns:
        `residual`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    m = x.shape[0]
    residual[:m] += _linear(x, weight)
    if residual.shape[0] > m:
        if constant is None:
            raise ValueError(f"constant: needed, residual has {residual.shape[0]} rows and x only {m}")
        residual[m:] += constant
    return residual


def glu(x: Tensor, out: Tensor) -> Tensor:
    """Gate: `out = silu(gate) * up` with `gate, up = x.chunk(2, -1)`, in fp32, rounded once.

    Args:
        x: `[rows, 2 * intermediate]`, gate first; the last axis contiguous.
        out: `[rows, intermediate]`, written; the last axis contiguous.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    gate, up = x.float().chunk(2, -1)
    return out.copy_(F.silu(gate) * up)


def rms_norm_glu(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """Normalise, project and gate: `out = silu(gate) * up` with `gate, up = (rms_norm(x) @ weight.T).chunk(2, -1)`.

    Args:
        x: `[rows, hidden]`, float32, float16 or bfloat16; the kernel takes 1 to 64 rows.
        norm_weight: `[hidden]`.
        weight: `[2 * intermediate, hidden]`, gate rows first, a tensor or what `pack` made of it.
        eps: Added to the mean square.
        out: `[rows, intermediate]`, written.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    return glu(_normed_linear(x, norm_weight, weight, eps), out)


def codebook_logits(x: Tensor, norm_weight: Tensor, weight: Weight, eps: float, out: Tensor) -> Tensor:
    """Apply the final norm and the heads of all channels: `out = rms_norm(x) @ weight.T`, as float32.

    Args:
        x: `[rows, hidden]`, float32, float16 or bfloat16; the kernel takes 1 to 64 rows.
        norm_weight: `[hidden]`.
        weight: `[channels * vocab, hidden]`, a tensor or what `pack` made of it.
        eps: Added to the mean square.
        out: `[rows, channels, vocab]` float32, written with values rounded to `x.dtype`: the head's result is rounded,
            all that follows is float32 (docs/dia.md).

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    return out.copy_(_normed_linear(x, norm_weight, weight, eps).to(x.dtype).view(out.shape))
