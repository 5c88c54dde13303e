"""Helpers for kernel tests: poisoned outputs, error budgets from data, dtypes and odd sizes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tests.kernels import executor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ODD_SIZES = (1, 3, 17, 63, 100)
_FP32_ULP = 2.0**-23


def random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values of standard deviation `scale`, the same on every device, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output buffer in which anything left unwritten shows: NaN, or the most negative integer."""
    if dtype.is_floating_point:
        return torch.full(tuple(shape), math.nan, dtype=dtype, device=device)
    return torch.full(tuple(shape), torch.iinfo(dtype).min, dtype=dtype, device=device)


def assert_within_budget(actual: Tensor, low_precision_reference: Tensor, exact_fp64: Tensor) -> float:
    """Assert that `actual` is about as close to `exact_fp64` as plain torch in the same dtype is.

    Largest and root-mean-square error may be twice those of `low_precision_reference` plus one rounding to the dtype of
    `actual`. The mean error, plain and towards zero, may not differ from 0 by more than six of its standard errors,
    plus twice the reference's own bias and two fp32 roundings that all elements share. Returns the ratio of the largest
    error to its budget.
    """
    assert actual.shape == low_precision_reference.shape == exact_fp64.shape, (
        f"shapes differ: {tuple(actual.shape)}, {tuple(low_precision_reference.shape)}, {tuple(exact_fp64.shape)}"
    )
    assert exact_fp64.dtype == torch.float64, f"exact_fp64 is {exact_fp64.dtype}"
    got, plain, exact = (t.detach().cpu().double().flatten() for t in (actual, low_precision_reference, exact_fp64))
    if exact.numel() == 0:
        return 0.0
    finite = plain.isfinite()
    wrong = (got.isfinite() != finite) | (~finite & (got != plain) & ~(got.isnan() & plain.isnan()))
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} values are not finite where they should be, or the reverse"
    )
    got, plain, exact = got[finite], plain[finite], exact[finite]
    if exact.numel() == 0:
        return 0.0
    error, allowed = got - exact, plain - exact
    rounding = torch.finfo(actual.dtype).eps / 2

    largest = error.abs().max().item()
    budget = 2 * allowed.abs().max().item() + rounding * exact.abs().max().item()
    assert largest <= budget, (
        f"largest error {largest:.3e} is over its budget of {budget:.3e} ({largest / budget:.2f} x)"
    )

    spread = error.square().mean().sqrt().item()
    spread_budget = 2 * allowed.square().mean().sqrt().item() + rounding * exact.square().mean().sqrt().item()
    assert spread <= spread_budget, f"root mean square error {spread:.3e} is over its budget of {spread_budget:.3e}"

    shared = 2 * _FP32_ULP * exact.abs().mean().item()
    for direction, name in ((torch.ones_like(exact), "mean error"), (exact.sign(), "mean error away from zero")):
        bias, plain_bias = (error * direction).mean().item(), (allowed * direction).mean().item()
        bias_budget = 6 * spread / math.sqrt(error.numel()) + 2 * abs(plain_bias) + shared
        assert abs(bias) <= bias_budget, f"{name} {bias:+.3e} is over its budget of {bias_budget:.3e}: it leans one way"
    return largest / budget if budget else 0.0


def program_orders() -> Iterator[AbstractContextManager[None]]:
    """Contexts in which a launch must give the same bits: all orders of programs of the interpreter, else two runs."""
    if not executor.interpreted():
        yield from (nullcontext(), nullcontext())
        return
    from bench.tools.interpreter import ORDERS, program_order

    yield from (program_order(order, seed) for seed, order in enumerate(ORDERS))


def assert_untouched(buffer: Tensor) -> None:
    """Assert that a poisoned buffer, or a part of one, still holds nothing but poison."""
    intact = buffer.isnan() if buffer.dtype.is_floating_point else buffer == torch.iinfo(buffer.dtype).min
    assert bool(intact.all()), (
        f"{int((~intact).sum())} of {buffer.numel()} values were written and should not have been"
    )
