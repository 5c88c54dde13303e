"""rotate: RoPE of packed q and k into another buffer, v copied; with `inverse`, its gradient.

    first, second = first * cos - second * sin, second * cos + first * sin        # halves of a head, rounded once

Training only, where the input of an op must stay; a rotation's transpose is the rotation back, so the gradient is the
same kernel with the sign of the sine turned. One program per token and group of heads; each element is read and
written once.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


@triton.jit
def _rotate(
    qkv_ptr,  # [tokens, HEADS, 2 * HALF]
    cos_ptr,  # [positions, HALF] float32
    sin_ptr,  # [positions, HALF] float32
    positions_ptr,  # [tokens] int32
    out_ptr,  # [tokens, HEADS, 2 * HALF]
    HEADS: tl.constexpr,  # q, k and v
    TURNING: tl.constexpr,  # q and k
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    angle = tl.arange(0, BLOCK_A)
    used = angle < HALF
    real = (h < HEADS)[:, None] & used[None, :]
    turning = (h < TURNING)[:, None]
    at = (token * HEADS + h[:, None]) * (2 * HALF) + angle[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + angle, mask=used, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + angle, mask=used, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    first = tl.load(qkv_ptr + at, mask=real, other=0.0)
    second = tl.load(qkv_ptr + at + HALF, mask=real, other=0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    new_first = (wide_first * cos - wide_second * sin).to(first.dtype)
    new_second = (wide_second * cos + wide_first * sin).to(first.dtype)
    tl.store(out_ptr + at, tl.where(turning, new_first, first), mask=real)
    tl.store(out_ptr + at + HALF, tl.where(turning, new_second, second), mask=real)


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    kv_heads: int,
    out: torch.Tensor,
    *,
    inverse: bool = False,
) -> torch.Tensor:
    """As `dia_kernels.reference.gradients.rotate`; all tensors contiguous. Raises ValueError naming the argument."""
    tokens, width = qkv.shape
    half = cos.shape[1]
    heads = width // (2 * half)
    if width % (2 * half) or heads < 2 * kv_heads:
        raise ValueError(f"qkv: {width} columns, needs (heads + 2 x {kv_heads}) x {2 * half}")
    if cos.shape != sin.shape or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(f"cos, sin: {tuple(cos.shape)}, {tuple(sin.shape)}, need the same shape in float32")
    if positions.shape != (tokens,) or positions.dtype != torch.int32:
        raise ValueError(f"positions: {positions.dtype} {tuple(positions.shape)}, needs int32 [{tokens}]")
    launch.require({"qkv": (qkv, qkv.shape), "out": (out, qkv.shape)})
    launch.require_contiguous(cos=cos, sin=sin, positions=positions)
    if tokens:
        block_h = min(32, triton.next_power_of_2(heads))
        launch.run(
            _rotate,
            (tokens, triton.cdiv(heads, block_h)),
            qkv,
            cos,
            sin,
            positions,
            out,
            HEADS=heads,
            TURNING=heads - kv_heads,
            HALF=half,
            BLOCK_H=block_h,
            BLOCK_A=triton.next_power_of_2(half),
            INVERSE=inverse,
            enable_fp_fusion=True,
            num_warps=4,
        )
    return out
