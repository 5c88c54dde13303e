"""rms_norm, glu, snake and snake_residual against fp64 formulas and the torch reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_kernels import reference
from dia_kernels.triton.glu import glu
from dia_kernels.triton.rms_norm import rms_norm
from dia_kernels.triton.snake import snake, snake_residual
from tests.helpers.tolerance import exponential_bound
from tests.kernels.support import DTYPES, ODD_SIZES, assert_within_budget, poisoned, random

EPS = 1e-5
ELEMENTWISE = settings(max_examples=15, deadline=None)


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def exact_glu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def exact_snake(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    wide, a = x.double(), alpha.double()[:, None]
    return wide + torch.sin(a * wide).square() / (a + 1e-9)


def check_rms_norm(rows: int, hidden: int, dtype: torch.dtype, device: torch.device, scale: float = 3.0) -> None:
    x, weight = random((rows, hidden), dtype, device, 1, scale), random((hidden,), dtype, device, 2)
    out = rms_norm(x, weight, EPS, poisoned((rows, hidden), dtype, device))
    plain = reference.rms_norm(x, weight, EPS, torch.empty_like(x))
    assert_within_budget(out, plain, exact_rms_norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ODD_SIZES[:3])
def test_rms_norm(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    check_rms_norm(rows, 80, dtype, device)


def test_rms_norm_production_width(device: torch.device) -> None:
    check_rms_norm(2, 2048, torch.bfloat16, device)


@ELEMENTWISE
@given(
    rows=st.integers(1, 9),
    sixteenths=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_rms_norm_shapes(rows: int, sixteenths: int, dtype: torch.dtype, scale: float) -> None:
    from tests.kernels import executor

    check_rms_norm(rows, 16 * sixteenths, dtype, executor.device(), scale)


def test_rms_norm_reads_strided_rows(device: torch.device) -> None:
    wide = random((5, 96), torch.float32, device, 3)
    out = rms_norm(wide[:, :32], torch.ones(32, device=device), EPS, poisoned((5, 32), torch.float32, device))
    alone = rms_norm(wide[:, :32].contiguous(), torch.ones(32, device=device), EPS, torch.empty(5, 32, device=device))
    assert torch.equal(out, alone)


def test_rms_norm_rows_do_not_depend_on_each_other(device: torch.device) -> None:
    x, weight = random((64, 48), torch.bfloat16, device, 4), random((48,), torch.bfloat16, device, 5)
    whole = rms_norm(x, weight, EPS, poisoned((64, 48), torch.bfloat16, device))
    for first, last in ((0, 1), (3, 20), (63, 64)):
        part = rms_norm(x[first:last], weight, EPS, poisoned((last - first, 48), torch.bfloat16, device))
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 100), (17, 63), (2, 8192)])
def test_glu(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x = random((rows, 2 * width), dtype, device, 6, 4.0)
    out = glu(x, poisoned((rows, width), dtype, device))
    assert_within_budget(out, reference.glu(x, torch.empty_like(out)), exact_glu(x))


def test_glu_of_extreme_gates_is_finite(device: torch.device) -> None:
    x = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    out = glu(x, poisoned((1, 5), torch.float32, device))
    exact = [0.0, -90 * math.exp(-90), 0.0, 90.0, 1e4]
    assert out.tolist()[0] == pytest.approx(exact, rel=exponential_bound(90))


def snake_case(dtype: torch.dtype, device: torch.device, samples: int, scale: float) -> tuple[torch.Tensor, ...]:
    x, y = (random((2, 3, samples), dtype, device, seed, scale) for seed in (7, 8))
    return x, y, random((3,), dtype, device, 9).abs() + 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 2.0, 40.0])
def test_snake(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    x, _, alpha = snake_case(dtype, device, 63, scale)
    out = snake(x, alpha, poisoned(x.shape, dtype, device))
    assert_within_budget(out, reference.snake(x, alpha, torch.empty_like(x)), exact_snake(x, alpha))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 100, 1025])
def test_snake_residual_equals_its_two_steps(dtype: torch.dtype, samples: int, device: torch.device) -> None:
    x, y, alpha = snake_case(dtype, device, samples, 1.0)
    total, out = poisoned(x.shape, dtype, device), poisoned(x.shape, dtype, device)
    snake_residual(x, y, alpha, total, out)
    assert torch.equal(total, x + y)
    assert torch.equal(out, snake(total, alpha, poisoned(x.shape, dtype, device)))


def test_snake_of_large_arguments_keeps_its_accuracy(device: torch.device) -> None:
    x = torch.linspace(-3000, 3000, 999, device=device).view(1, 1, -1)
    alpha = torch.tensor([1.0], device=device)
    out = snake(x, alpha, poisoned(x.shape, torch.float32, device))
    # sin(x)^2 <= 1 on top of x: what is left is the rounding of x + sin^2 to fp32 and three ulp of the sine.
    assert (out.double() - exact_snake(x, alpha)).abs().max() <= 3000 * 2.0**-24 + 3 * 2.0**-23


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: glu(torch.ones(2, 6), torch.ones(2, 4)), "x: shape"),
        (lambda: rms_norm(torch.ones(4, 2).T, torch.ones(4), EPS, torch.ones(2, 4)), "last axis"),
        (lambda: snake(torch.ones(1, 2, 4), torch.ones(3), torch.ones(1, 2, 4)), "alpha: shape"),
        (lambda: snake(torch.ones(1, 4, 2).mT, torch.ones(2), torch.ones(1, 2, 4)), "x: has strides"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
