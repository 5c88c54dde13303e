"""rms_norm: `out = x / sqrt(mean(x^2) + eps) * weight`, in fp32, rounded once. Prefill only; decode fuses it.

One program per row; the row is read once and kept in registers. Moves 2 * hidden elements a row, plus the weight.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


@triton.jit
def _rms_norm(
    x_ptr,  # [rows, HIDDEN]
    weight_ptr,  # [HIDDEN]
    out_ptr,  # [rows, HIDDEN]
    stride_xm,
    stride_om,
    EPS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < HIDDEN
    x = tl.load(x_ptr + row * stride_xm + h, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + EPS)
    tl.store(out_ptr + row * stride_om + h, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def _default_config(dtype: torch.dtype, arch: str, *, hidden: int) -> dict[str, int]:
    return {"num_warps": max(1, min(8, triton.next_power_of_2(hidden) // 512))}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """As `dia_kernels.reference.rms_norm`; x and out `[rows, hidden]` with a contiguous last axis, hidden <= 32768."""
    rows, hidden = x.shape
    if x.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError(f"x, out: the last axis must be contiguous, strides are {x.stride()} and {out.stride()}")
    if weight.shape != (hidden,) or out.shape != x.shape:
        raise ValueError(f"weight, out: shapes {tuple(weight.shape)}, {tuple(out.shape)} do not fit x {tuple(x.shape)}")
    if hidden > 32768:
        raise ValueError(f"x: hidden size {hidden} is above 32768, the largest row one program keeps in registers")
    if rows:
        config = launch.configuration("rms_norm", _default_config, x.dtype, x.device, hidden=hidden)
        launch.run(
            _rms_norm,
            (rows,),
            x,
            weight,
            out,
            x.stride(0),
            out.stride(0),
            EPS=eps,
            HIDDEN=hidden,
            BLOCK_H=triton.next_power_of_2(hidden),
            **config,
        )
    return out
