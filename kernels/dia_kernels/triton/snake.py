"""snake and snake_residual: `out = x + sin(alpha * x)^2 / (alpha + 1e-9)`, alone or after a residual addition.

Elementwise over `[batch, channels, samples]` with one alpha per channel, the memory-bound part of the DAC decoder.
The fused form reads x and the residual once and writes their sum and its activation: 4 elements moved instead of 5.
The sine is computed here, from an exact reduction and a polynomial, so that every target gives the same accuracy:
hardware sines lose all digits at the arguments that alpha * x can reach.
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


@triton.jit
def _sin_squared(x):
    """sin(x)^2 in fp32: x less its multiples of pi, in three steps, then an odd polynomial on [-pi/2, pi/2]."""
    turns = tl.floor(x * 0.3183098861837907 + 0.5)
    r = x - turns * 3.140625
    r = r - turns * 0.0009675025939941406
    r = r - turns * 1.5099580252808664e-07
    s = r * r
    p = -2.505210838544172e-08
    p = p * s + 2.7557319223985893e-06
    p = p * s - 1.984126984126984e-04
    p = p * s + 8.333333333333333e-03
    p = p * s - 1.6666666666666666e-01
    sine = r + r * s * p
    return sine * sine


@triton.jit
def _snake(
    x_ptr,  # [batch, CHANNELS, samples]
    residual_ptr,  # as x, or unused
    alpha_ptr,  # [CHANNELS]
    total_ptr,  # as x, or unused
    out_ptr,  # as x
    samples,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    line = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < samples
    at = line * samples + t
    alpha = tl.load(alpha_ptr + line % CHANNELS).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, x, mask=inside)
    wide = x.to(tl.float32)
    tl.store(out_ptr + at, (wide + _sin_squared(alpha * wide) / (alpha + 1e-9)).to(x.dtype), mask=inside)


def _run(
    x: torch.Tensor, residual: torch.Tensor | None, alpha: torch.Tensor, total: torch.Tensor | None, out: torch.Tensor
) -> None:
    batch, channels, samples = x.shape
    launch.require({"x": (x, x.shape), "alpha": (alpha, (channels,)), "out": (out, x.shape)})
    if residual is not None and total is not None:
        launch.require({"residual": (residual, x.shape), "total": (total, x.shape)})
    if batch * channels > 65535:
        raise ValueError(f"x: batch x channels is {batch * channels}; one launch takes 65535, split the batch")
    if x.numel():
        config = launch.configuration("snake", _default_config, x.dtype, x.device, samples=samples)
        launch.run(
            _snake,
            (triton.cdiv(samples, config["BLOCK"]), batch * channels),
            x,
            residual,
            alpha,
            total,
            out,
            samples,
            CHANNELS=channels,
            HAS_RESIDUAL=residual is not None,
            **config,
        )


def _default_config(dtype: torch.dtype, arch: str, *, samples: int) -> dict[str, int]:
    return {"BLOCK": min(triton.next_power_of_2(samples), 1024), "num_warps": 4}


def snake(x: torch.Tensor, alpha: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """As `dia_kernels.reference.snake`; all tensors contiguous, batch * channels at most 65535."""
    _run(x, None, alpha, None, out)
    return out


def snake_residual(
    x: torch.Tensor, residual: torch.Tensor, alpha: torch.Tensor, total: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """As `dia_kernels.reference.snake_residual`; all tensors contiguous, batch * channels at most 65535."""
    _run(x, residual, alpha, total, out)
    return out
