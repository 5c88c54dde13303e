"""Snake, the activation of the DAC codec."""

import torch
from torch import Tensor


def snake(x: Tensor, alpha: Tensor, out: Tensor) -> Tensor:
    """Activate: `out = x + sin(alpha * x)^2 / (alpha + 1e-9)`, in fp32, rounded once.

    Formula: Ziyin et al. 2020; 1e-9 as in DAC.

    Args:
        x: `[batch, channels, samples]`.
        alpha: `[channels]`.
        out: `[batch, channels, samples]`, written; may be x.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    wide, a = x.float(), alpha.float()[:, None]
    return out.copy_(wide + torch.sin(a * wide).square() / (a + 1e-9))


def snake_residual(x: Tensor, residual: Tensor, alpha: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """Add and activate: `total = x + residual; out = snake(total)`, between two residual units of DAC.

    `total` is rounded to its dtype before the activation reads it, so the result equals the two steps one after
    another.

    Args:
        x: `[batch, channels, samples]`.
        residual: As x.
        alpha: `[channels]`.
        total: As x, written; may be x or residual.
        out: As x, written; may be x or residual.

    Returns:
        `out`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    torch.add(x, residual, out=total)
    return snake(total, alpha, out)
