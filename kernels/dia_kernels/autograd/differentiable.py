"""Ops that training differentiates, as functions of tensors: RMSNorm, RoPE, GLU, and the heads with their loss.

Each takes a set of gradient ops: `reference.gradients` in torch, `autograd.gradients` in Triton;
`gradient_ops` chooses. Forward and backward both come from it; backward recomputes what is cheap to recompute, so that
nothing but the inputs is kept.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dia_kernels.ops import get_ops

CHUNK_ROWS = 256  # of logits that exist at a time; 9252 of them in a row of Dia-1.6B


def gradient_ops(backend: str = "auto", device: torch.device | str = "cpu") -> ModuleType:
    """Return the gradient ops for tensors on `device`; backends and errors as in `get_ops`."""
    triton = get_ops(backend, device).name == "triton"
    return importlib.import_module("dia_kernels.autograd.gradients" if triton else "dia_kernels.reference.gradients")


def rms_norm(x: Tensor, weight: Tensor, eps: float, ops: ModuleType) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in the dtype of x; weight may be wider."""
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, ops).view(x.shape)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_heads: int, ops: ModuleType) -> Tensor:
    """Rotate q and k of `[tokens, (heads + 2 * kv_heads) * head_dim]` to their positions; see the op `rotate`."""
    return _Rope.apply(qkv, cos, sin, positions, kv_heads, ops)


def glu(x: Tensor, ops: ModuleType) -> Tensor:
    """`silu(gate) * up` with `gate, up = x.chunk(2, -1)`: `[..., 2 * n]` to `[..., n]`."""
    return _GLU.apply(x.reshape(-1, x.shape[-1]), ops).view(*x.shape[:-1], x.shape[-1] // 2)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    channel_weights: Tensor,
    ops: ModuleType,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `x @ weight.T` over all heads, without ever holding more than `chunk_rows` rows of logits.

    x: `[rows, hidden]`; weight: `[channels * vocab, hidden]`, of any dtype, used in that of x; labels:
    `[rows, channels]` int64, negative for positions that do not count; channel_weights: `[channels]` float32.
    Returns `(total, losses)`: the sum over all labels of `channel_weights[channel] * loss`, a scalar to differentiate,
    and the unweighted sums of each channel, `[channels]`, not differentiable. Both float32.

    The gradients are formed in the forward pass, chunk by chunk, and scaled in the backward pass: memory for them and
    one chunk instead of several times `rows * channels * vocab`. The idea is that of Hsu et al. 2024, "Liger Kernel".
    """
    wanted = torch.is_grad_enabled() and x.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    return _LinearCrossEntropy.apply(x, weight, labels, channel_weights, ops, chunk_rows, wanted)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, ops: ModuleType) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.ops = eps, ops
        return ops.rms_norm(x, weight, eps, torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        dx = ctx.ops.rms_norm_backward(x, weight, ctx.eps, grad.contiguous(), torch.empty_like(x), dweight)
        return dx, dweight, None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_heads: int, ops: ModuleType
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.kv_heads, ctx.ops = kv_heads, ops
        return ops.rotate(qkv, cos, sin, positions, kv_heads, torch.empty_like(qkv))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        back = ctx.ops.rotate(grad, *ctx.saved_tensors, ctx.kv_heads, torch.empty_like(grad), inverse=True)
        return back, None, None, None, None, None


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: ModuleType) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ops = ops
        return ops.glu(x, x.new_empty(x.shape[0], x.shape[1] // 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.ops.glu_backward(x, grad.contiguous(), torch.empty_like(x)), None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        channel_weights: Tensor,
        ops: ModuleType,
        chunk_rows: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        channels = labels.shape[1]
        narrow = weight.to(x.dtype)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.zeros_like(weight) if wanted[1] else None
        sums = x.new_zeros(channels, dtype=wide)
        for first in range(0, x.shape[0], chunk_rows):
            part = slice(first, first + chunk_rows)
            logits = x[part] @ narrow.T
            losses = logits.new_empty(logits.shape[0], channels, dtype=wide)
            by_channel = logits.view(logits.shape[0], channels, -1)
            sums += ops.cross_entropy(by_channel, labels[part], channel_weights, losses, gradient=any(wanted)).sum(0)
            if dx is not None:
                torch.mm(logits, narrow, out=dx[part])
            if dweight is not None:
                _add_outer(dweight, logits, x[part], channels)
        ctx.gradients = dx, dweight
        ctx.mark_non_differentiable(sums)
        return sums @ channel_weights.to(wide), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients are scaled in place, so backward runs only once")
        (dx, dweight), ctx.gradients = ctx.gradients, None
        for gradient in (dx, dweight):
            if gradient is not None:
                # A 16-bit tensor times a scalar would round the scalar first, an error in one direction.
                for part in gradient.split(CHUNK_ROWS):
                    part.copy_(part.to(grad.dtype) * grad)
        return dx, dweight, None, None, None, None, None


def _add_outer(total: Tensor, left: Tensor, right: Tensor, channels: int) -> None:
    """`total += left.T @ right`, summed in the dtype of `total`, with room for one channel of the product at most."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
        return
    for into, columns in zip(total.chunk(channels), left.chunk(channels, 1), strict=True):
        into += columns.T @ right
