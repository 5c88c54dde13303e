"""The harness itself, on whatever runs the kernels: budgets, poison, and a small kernel with most of what they do."""

import pytest
import torch
import triton
import triton.language as tl

from dia_kernels import get_ops
from dia_kernels import launcher as launch
from tests.kernels import executor
from tests.kernels.support import (
    DTYPES,
    ODD_SIZES,
    assert_untouched,
    assert_within_budget,
    poisoned,
    program_orders,
    random,
)

ROWS = 4  # an error budget taken from a single number would be a matter of luck


@triton.jit
def _softmax_sum(x_ptr, weight_ptr, partial_ptr, counter_ptr, out_ptr, n, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = sum_i softmax(x[row])_i * weight_i, cut into PARTS programs, merged in order by the last to arrive."""
    row, part = tl.program_id(0), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + i, mask=i < n, other=float("-inf")).to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    peak = tl.max(x, 0)
    e = tl.where(i < n, tl.exp(x - peak), 0.0)
    partial_ptr += row * 3 * PARTS
    tl.store(partial_ptr + part, peak)
    tl.store(partial_ptr + PARTS + part, tl.sum(e, 0))
    tl.store(partial_ptr + 2 * PARTS + part, tl.sum(e * weight, 0))
    if tl.atomic_add(counter_ptr + row, 1) == PARTS - 1:
        p = tl.arange(0, PARTS)
        peaks = tl.load(partial_ptr + p)
        scale = tl.exp(peaks - tl.max(peaks, 0))
        total = tl.sum(tl.load(partial_ptr + PARTS + p) * scale, 0)
        value = tl.sum(tl.load(partial_ptr + 2 * PARTS + p) * scale, 0) / total
        tl.store(out_ptr + row, value.to(out_ptr.dtype.element_ty))
        tl.store(counter_ptr + row, 0)


def softmax_sum(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    block = max(triton.next_power_of_2(-(-n // 4)), 16)
    parts = triton.next_power_of_2(-(-n // block))
    partial = poisoned((ROWS, 3, parts), torch.float32, x.device)
    counter = torch.zeros(ROWS, dtype=torch.int32, device=x.device)
    out = poisoned((ROWS + 1,), x.dtype, x.device)
    launch.run(_softmax_sum, (ROWS, parts), x, weight, partial, counter, out, n, PARTS=parts, BLOCK=block)
    assert_untouched(out[ROWS:])
    assert not counter.any()
    return out[:ROWS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ODD_SIZES)
def test_a_kernel_with_a_last_arriver(n: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random((ROWS, n), dtype, device, 1, 3.0), random((n,), dtype, device, 2)
    exact = x.double().softmax(1) @ weight.double()
    low = (x.softmax(1) * weight).sum(1)
    results = []
    for order in program_orders():
        with order:
            results.append(softmax_sum(x, weight))
    assert_within_budget(results[0], low, exact)
    assert all(torch.equal(result, results[0]) for result in results), "it depends on the order of programs"


def test_triton_is_accepted_here(device: torch.device) -> None:
    assert get_ops("triton", device).name == "triton"
    assert (launch.architecture(device) == "interpreter") == executor.interpreted()


def exact_and_plain(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    exact = random((64, 64), torch.float64, torch.device("cpu"), 3)
    return exact, exact.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_once_is_within_budget(dtype: torch.dtype) -> None:
    exact, plain = exact_and_plain(dtype)
    assert assert_within_budget(plain, plain, exact) <= 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_over_budget(dtype: torch.dtype) -> None:
    """Errors that lean, a single large one, many small ones, and what is not finite."""
    exact, plain = exact_and_plain(dtype)
    for wrong, step in (
        (plain.double().abs() > exact.abs(), -1),  # rounded towards zero
        (plain.double() > exact, -plain.sign().short()),  # rounded down
    ):
        leaning = (plain.view(torch.int16) + torch.where(wrong, step, 0)).to(torch.int16).view(dtype)
        with pytest.raises(AssertionError, match="leans one way"):
            assert_within_budget(leaning, plain, exact)
    one_off = plain.clone()
    one_off[5, 5] += 1
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_budget(one_off, plain, exact)
    noise = torch.finfo(dtype).eps * random(exact.shape, torch.float64, exact.device, 4).sign()
    with pytest.raises(AssertionError, match="root mean square error"):
        assert_within_budget((exact + noise).to(dtype), plain, exact)
    one_off[5, 5] = torch.nan
    with pytest.raises(AssertionError, match="1 of 4096 values are not finite"):
        assert_within_budget(one_off, plain, exact)


def test_poison_shows(device: torch.device) -> None:
    for dtype in (*DTYPES, torch.int32, torch.int64):
        buffer = poisoned((3, 5), dtype, device)
        assert_untouched(buffer)
        buffer[1, 2] = 0
        with pytest.raises(AssertionError, match="1 of 15 values were written"):
            assert_untouched(buffer)
