"""Snake, the activation of the DAC codec."""

import torch
from torch import Tensor


def snake(x: Tensor, alpha: Tensor, out: Tensor) -> Tensor:
    """`out = x + sin(alpha * x)^2 / (alpha + 1e-9)`, in fp32, rounded once.

    x, out: `[batch, channels, samples]`; alpha: `[channels]`. `out` may be x.
    Formula: Ziyin et al. 2020; 1e-9 as in DAC.
    """
    wide, a = x.float(), alpha.float()[:, None]
    return out.copy_(wide + torch.sin(a * wide).square() / (a + 1e-9))


def snake_residual(x: Tensor, residual: Tensor, alpha: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """`total = x + residual; out = snake(total)`: the end of one DAC residual unit and the start of the next.

    x, residual, total, out: `[batch, channels, samples]`; alpha: `[channels]`. `total` is rounded to its dtype before
    the activation reads it, so that the result equals the two steps done one after another. Both results may go where
    an input lies.
    """
    torch.add(x, residual, out=total)
    return snake(total, alpha, out)
