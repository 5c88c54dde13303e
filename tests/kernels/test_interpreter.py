"""The repaired interpreter's numbers, against torch's own arithmetic in the same format."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.kernels import executor

if not executor.interpreted():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

from bench.tools.interpreter import formats
from tests.helpers.tolerance import sum_bound

N = 256
HALVES = (torch.bfloat16, torch.float16)
FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def all_bits(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit format."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, all NaNs alike."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@triton.jit
def _binary(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "less":
        z = x < y
    elif OP == "equal":
        z = x == y
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "where":
        z = tl.where(x > 0, x, y)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    tl.store(out_ptr + i, z)


BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "less": torch.less,
    "equal": torch.eq,
    "maximum": lambda x, y: torch.where(x.isnan(), y, torch.where((x > y) | y.isnan(), x, y)),
    "minimum": lambda x, y: torch.where(x.isnan(), y, torch.where((x < y) | y.isnan(), x, y)),
    "where": lambda x, y: torch.where(x > 0, x, y),
}


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("dtype", HALVES)
def test_binary(op: str, dtype: torch.dtype) -> None:
    x = all_bits(dtype)
    y = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))]
    expected = BINARY[op](x, y)
    out = torch.empty_like(expected)
    _binary[(1,)](x, y, out, OP=op, BLOCK=x.numel())
    assert same(out, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    """No worse than torch's rounding of the fp64 result, which for bf16 goes through fp32."""
    x = all_bits(dtype)
    y = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))]
    exact = x.double() * y.double() + x.double()
    out, expected = torch.empty_like(x), exact.to(dtype)
    _binary[(1,)](x, y, out, OP="fma", BLOCK=x.numel())
    finite = expected.isfinite() & out.isfinite()
    assert torch.equal(out.isnan(), expected.isnan())
    assert (finite == expected.isfinite()).float().mean() > 0.999, "only results that round to the border may differ"
    assert ((out.double() - exact).abs() <= (expected.double() - exact).abs())[finite].all()


def test_fma_keeps_the_low_half_of_the_product() -> None:
    x, out = torch.full((4,), 1 + 2.0**-12), torch.zeros(4)
    _fma[(1,)](x, out, BLOCK=4)
    assert out.tolist() == [2.0**-24] * 4


@triton.jit
def _fma(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.fma(x, x, x * 0 - (1 + 2.0**-11)))


@triton.jit
def _unary(x_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "round trip":
        z = x.to(tl.float32).to(x.dtype)
    elif OP == "constant":
        z = x * tl.full([BLOCK], 0.3, x.dtype)
    tl.store(out_ptr + i, z)


UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "round trip": torch.clone,
    "constant": lambda x: x * torch.tensor([0.3], dtype=x.dtype),
}


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("dtype", HALVES)
def test_unary(op: str, dtype: torch.dtype) -> None:
    x = all_bits(dtype)
    out = torch.empty_like(x)
    _unary[(1,)](x, out, OP=op, BLOCK=x.numel())
    assert same(out, UNARY[op](x))


@triton.jit
def _cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, out, BLOCK=x.numel())
    return out


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.uint32, 64))
def test_fp32_bits_round_to_nearest_even(bits: np.ndarray) -> None:
    x = torch.from_numpy(bits.view(np.float32))
    for dtype in HALVES:
        assert same(cast(x, dtype), x.to(dtype))


def test_ties_and_overflow_of_casts() -> None:
    ulp = 2.0**-8
    x = torch.tensor(
        [1 + ulp, 1 + 3 * ulp, -1 - ulp, 1 + ulp + 2**-23, 3.4e38, -3.4e38, 65520.0, 65519.0, 1e-42, 0.0, -0.0]
    )
    x = torch.nn.functional.pad(x, (0, 16 - x.numel()))
    for dtype in HALVES:
        assert same(cast(x, dtype), x.to(dtype))
    assert cast(x, torch.float16)[6] == torch.inf, "numbers beyond fp16 become inf, not NaN and not the largest number"


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.float64, 32, elements=st.floats(-1e39, 1e39)))
def test_fp64_rounds_once(values: np.ndarray) -> None:
    """Against the nearest of the two neighbours, found in fp64."""
    got = formats.narrow(values, tl.bfloat16).astype(np.uint32) << 16
    got = got.view(np.float32).astype(np.float64)
    near = torch.from_numpy(values).to(torch.bfloat16)
    for candidate in (
        near,
        near.nextafter(torch.tensor(torch.inf).bfloat16()),
        near.nextafter(-torch.tensor(torch.inf).bfloat16()),
    ):
        other = candidate.double().numpy()
        inside = np.isfinite(other) & np.isfinite(got)
        assert (np.abs(got - values)[inside] <= np.abs(other - values)[inside]).all()


def test_fp64_to_bf16_does_not_round_twice() -> None:
    just_above_a_tie = np.array([1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1 + 2.0**-8, 1 + 2.0**-8 - 2.0**-40])
    assert formats.narrow(just_above_a_tie, tl.bfloat16).tolist() == [0x3F81, 0xBF81, 0x3F80, 0x3F80]


@pytest.mark.parametrize("kind", FP8)
def test_fp8(kind: tl.dtype) -> None:
    dtype = FP8[kind]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    wide = codes.view(dtype).float()
    assert same(torch.from_numpy(formats.widen(codes.numpy(), kind)), wide)
    largest = torch.finfo(dtype).max
    x = torch.cat(
        (torch.randn(4096, generator=torch.Generator().manual_seed(2)) * 100, torch.tensor([1e9, -torch.inf]))
    )
    expected = x.clamp(-largest, largest).to(dtype).view(torch.uint8)
    assert torch.equal(torch.from_numpy(formats.narrow(x.numpy(), kind)), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8])
def test_floats_to_integers_saturate(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.tensor([1.9, -1.9, 1e30, -1e30, torch.nan, torch.inf, 0.0, 100.5])
    assert cast(x, dtype).tolist() == [1, -1, info.max, info.min, 0, info.max, 0, 100]


@pytest.mark.parametrize("dtype", HALVES)
def test_integers_to_floats(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    assert same(cast(x, dtype), x.to(dtype))


@triton.jit
def _reduce(x_ptr, out_ptr, OP: tl.constexpr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    if OP == "sum":
        z = tl.sum(x, AXIS)
    elif OP == "max":
        z = tl.max(x, AXIS)
    elif OP == "min":
        z = tl.min(x, AXIS)
    elif OP == "argmax":
        z = tl.argmax(x, AXIS)
    elif OP == "keep":
        z = tl.reshape(tl.sum(x, AXIS, keep_dims=True), [M if AXIS == 1 else N])
    tl.store(out_ptr + tl.arange(0, M if AXIS == 1 else N), z)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax", "keep"])
def test_reductions(op: str, axis: int, dtype: torch.dtype) -> None:
    m, n = 8, 16
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[2, 5] = x[2, 9] = x[7, 9] = 5.0  # ties: the first one wins
    out = torch.zeros(m if axis == 1 else n, dtype=torch.int32 if op == "argmax" else torch.float32)
    _reduce[(1,)](x, out, OP=op, AXIS=axis, M=m, N=n)
    if op in ("sum", "keep"):
        steps = x.shape[axis].bit_length()
        assert (out - x.double().sum(axis)).abs().max() <= steps * torch.finfo(dtype).eps / 2 * x.float().abs().sum(
            axis
        ).max()
    else:
        expected = {"max": x.amax, "min": x.amin, "argmax": x.argmax}[op](axis)
        assert torch.equal(out.to(expected.dtype), expected)


def test_fp16_sums_round_at_every_step() -> None:
    """As a GPU does, and unlike numpy, which sums halves in fp32: 2048 + 1 is 2048 in fp16."""
    x = torch.ones(1, 4096, dtype=torch.float16)
    x[0, ::2] = 2048
    out = torch.zeros(1, dtype=torch.float32)
    _reduce[(1,)](x[:, :4].contiguous(), out, OP="sum", AXIS=1, M=1, N=4)
    assert out.item() == 4096, "2048 + 1 and 2048 + 1 each lose their 1"


@triton.jit
def _affine(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def _scan(a_ptr, b_ptr, sums_ptr, states_ptr, REVERSE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(sums_ptr + i, tl.cumsum(b, 0, reverse=REVERSE))
    product, state = tl.associative_scan((a, b), 0, _affine, reverse=REVERSE)
    tl.store(states_ptr + i, state)


@pytest.mark.parametrize("reverse", [False, True])
def test_scans_keep_the_order(reverse: bool) -> None:
    """The combine function does not commute."""
    a, b = (torch.randn(32, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    sums, states = torch.empty(32), torch.empty(32)
    _scan[(1,)](a, b, sums, states, REVERSE=reverse, N=32)
    state, total, state_size, total_size = 0.0, 0.0, 0.0, 0.0
    for i in range(31, -1, -1) if reverse else range(32):
        state, total = state * a[i].double() + b[i].double(), total + b[i].double()
        state_size = state_size * abs(a[i].double()) + abs(b[i].double())
        total_size += abs(b[i].double())
        # Each step multiplies and adds, in whatever order.
        assert abs(states[i] - state) <= sum_bound(2 * 32, state_size)
        assert abs(sums[i] - total) <= sum_bound(32, total_size)


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    a = tl.load(a_ptr + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    b = tl.load(b_ptr + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
    z = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], z)


def dot(dtype: torch.dtype, precision: str = "ieee", m: int = 8, n: int = 4, k: int = 32) -> float:
    """Largest error of a product, relative to the sum of magnitudes."""
    generator = torch.Generator().manual_seed(6)
    a, b = torch.randn(m, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)
    out = torch.full((m, n), torch.nan)
    _dot[(1,)](a, b, out, PRECISION=precision, M=m, N=n, K=k)
    return ((out - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_dot_is_exact_in_its_operands(dtype: torch.dtype) -> None:
    assert dot(dtype) <= sum_bound(32, 1.0)


def test_dot_in_tf32_loses_digits() -> None:
    assert 1e-5 < dot(torch.float32, "tf32") < 2**-9


def test_dot_refuses_what_a_gpu_refuses() -> None:
    with pytest.raises(Exception, match="K >= 16"):
        dot(torch.bfloat16, k=8)
