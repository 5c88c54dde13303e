"""glu_backward: with `s = sigmoid(gate)`:  dgate = grad * up * s * (1 + gate * (1 - s)),  dup = grad * gate * s.

Training only. Elementwise over rows x intermediate: reads three elements and writes two for each of the gradient's.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


@triton.jit
def _glu_backward(
    x_ptr,  # [rows, 2 * WIDTH], gate first
    grad_ptr,  # [rows, WIDTH]
    dx_ptr,  # [rows, 2 * WIDTH]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < WIDTH
    gate = tl.load(x_ptr + row * (2 * WIDTH) + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * WIDTH) + WIDTH + f, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * WIDTH + f, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # of the negative magnitude, so that it cannot overflow
    s = tl.where(gate >= 0, 1.0, small) / (1.0 + small)
    rest = tl.where(gate >= 0, small, 1.0) / (1.0 + small)  # 1 - s, without losing the digits of a small one
    dgate = grad * up * s * (1.0 + gate * rest)
    dup = grad * gate * s
    tl.store(dx_ptr + row * (2 * WIDTH) + f, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + row * (2 * WIDTH) + WIDTH + f, dup.to(dx_ptr.dtype.element_ty), mask=inside)


def glu_backward(x: torch.Tensor, grad: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    """As `dia_kernels.reference.gradients.glu_backward`; all tensors contiguous."""
    rows, width = grad.shape
    launch.require({"x": (x, (rows, 2 * width)), "grad": (grad, grad.shape), "dx": (dx, (rows, 2 * width))})
    block = min(triton.next_power_of_2(width), 1024)
    if rows:
        launch.run(
            _glu_backward,
            (rows, triton.cdiv(width, block)),
            x,
            grad,
            dx,
            WIDTH=width,
            BLOCK=block,
            enable_fp_fusion=True,
            num_warps=max(1, min(4, block // 256)),
        )
    return dx
