"""rms_norm_backward: the gradients of `out = x / rms(x) * weight`, where rms(x) = sqrt(mean(x^2) + eps).

    n = x / rms(x);  g = grad * weight;  dx = (g - n * mean(g * n)) / rms(x);  dweight = sum over rows of grad * n

Training only. One program for every ROWS rows, which reads x and the gradient once, writes dx once, and adds its rows'
share of dweight up in registers: 3 * hidden elements a row. The shares are then summed by torch, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch

ROWS = 8  # of a program: the shares of dweight are 4 / (8 * itemsize) of the size of x


@triton.jit
def _rms_norm_backward(
    x_ptr,  # [rows, HIDDEN]
    weight_ptr,  # [HIDDEN]
    grad_ptr,  # [rows, HIDDEN]
    dx_ptr,  # [rows, HIDDEN]
    shares_ptr,  # [programs, HIDDEN] float32, or unused
    rows,
    EPS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SHARES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < HIDDEN
    weight = tl.load(weight_ptr + h, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros([BLOCK_H], tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        real = inside & (row < rows)
        at = row * HIDDEN + h
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=real, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + EPS)
        normed = x * inverse
        share += grad * normed
        grad = grad * weight
        dx = (grad - normed * (tl.sum(grad * normed, 0) / HIDDEN)) * inverse
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=real)
    if HAS_SHARES:
        tl.store(shares_ptr + program * HIDDEN + h, share, mask=inside)


def rms_norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    dx: torch.Tensor,
    dweight: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `dia_kernels.reference.gradients.rms_norm_backward`; all contiguous, hidden <= 32768; allocates the shares."""
    rows, hidden = x.shape
    launch.require({"x": (x, x.shape), "weight": (weight, (hidden,)), "grad": (grad, x.shape), "dx": (dx, x.shape)})
    if dweight is not None:
        launch.require({"dweight": (dweight, (hidden,))})
    if hidden > 32768:
        raise ValueError(f"x: hidden size {hidden} is above 32768, the largest row one program keeps in registers")
    programs = triton.cdiv(rows, ROWS)
    shares = None if dweight is None else x.new_empty(programs, hidden, dtype=torch.float32)
    if rows:
        launch.run(
            _rms_norm_backward,
            (programs,),
            x,
            weight,
            grad,
            dx,
            shares,
            rows,
            EPS=eps,
            HIDDEN=hidden,
            BLOCK_H=triton.next_power_of_2(hidden),
            ROWS=ROWS,
            HAS_SHARES=shares is not None,
            enable_fp_fusion=True,
            num_warps=max(1, min(8, triton.next_power_of_2(hidden) // 256)),
        )
    if dweight is not None and shares is not None:
        dweight.copy_(shares.sum(0))
    return dx
