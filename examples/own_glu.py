"""A kernel of your own in the place of a shipped one: the template of docs/own-kernels.md.

    python -m bench.codegen --ops examples.own_glu --targets sm_90 --rows 2 --dtypes bfloat16

It computes `glu`, a row in each program. Copy the file, rename it, and change what is inside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dia_kernels import launcher

launcher.register("own_glu")  # a table of configs may name it


@triton.jit
def _own_glu(
    x_ptr,  # [rows, 2 * WIDTH], gate first
    out_ptr,  # [rows, WIDTH]
    stride_xm,
    stride_om,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, WIDTH, BLOCK):
        f = start + tl.arange(0, BLOCK)
        inside = f < WIDTH
        gate = tl.load(x_ptr + row * stride_xm + f, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * stride_xm + WIDTH + f, mask=inside, other=0.0).to(tl.float32)
        small = tl.exp(-tl.abs(gate))  # of the gate's size, so that it cannot overflow
        silu = gate * tl.where(gate >= 0, 1.0, small) / (1.0 + small)
        tl.store(out_ptr + row * stride_om + f, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


def _default_config(dtype: torch.dtype, arch: str, *, width: int) -> dict[str, int]:
    return {"BLOCK": min(triton.next_power_of_2(width), 2048), "num_warps": 4}


def glu(x: Tensor, out: Tensor) -> Tensor:
    """As `dia_kernels.reference.glu`: the same arguments, checks and result."""
    rows, width = out.shape
    if x.shape != (rows, 2 * width):
        raise ValueError(f"x: shape {tuple(x.shape)} does not match out {tuple(out.shape)}; needs {(rows, 2 * width)}")
    if x.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError(f"x, out: the last axis must be contiguous, strides are {x.stride()} and {out.stride()}")
    if rows:
        config = launcher.configuration("own_glu", _default_config, x.dtype, x.device, width=width)
        launcher.run(_own_glu, (rows,), x, out, x.stride(0), out.stride(0), WIDTH=width, **config)
    return out
