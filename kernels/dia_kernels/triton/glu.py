"""glu: `out = silu(gate) * up` with `gate, up = x.chunk(2, -1)`, in fp32, rounded once. Prefill only; decode fuses it.

Elementwise over rows x intermediate: reads two elements and writes one for each output.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


@triton.jit
def silu(x):
    """Return x * sigmoid(x), from the exponential of -|x| so that it cannot overflow."""
    small = tl.exp(-tl.abs(x))
    return x * tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _glu(
    x_ptr,  # [rows, 2 * WIDTH], gate first
    out_ptr,  # [rows, WIDTH]
    stride_xm,
    stride_om,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < WIDTH
    gate = tl.load(x_ptr + row * stride_xm + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_xm + WIDTH + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_om + f, (silu(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


def _default_config(dtype: torch.dtype, arch: str, *, width: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(width), 1024)
    return {"BLOCK": block, "num_warps": max(1, min(4, block // 256))}


def glu(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """As `dia_kernels.reference.glu`; x `[rows, 2 * intermediate]` and out with a contiguous last axis."""
    rows, width = out.shape
    if x.shape != (rows, 2 * width):
        raise ValueError(f"x: shape {tuple(x.shape)} does not match out {tuple(out.shape)}; needs {(rows, 2 * width)}")
    if x.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError(f"x, out: the last axis must be contiguous, strides are {x.stride()} and {out.stride()}")
    if rows:
        config = launch.configuration("glu", _default_config, x.dtype, x.device, width=width)
        launch.run(
            _glu,
            (rows, triton.cdiv(width, config["BLOCK"])),
            x,
            out,
            x.stride(0),
            out.stride(0),
            WIDTH=width,
            **config,
        )
    return out
