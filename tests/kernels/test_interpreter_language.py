"""The repaired interpreter as a compiler: what it refuses, what it checks, how it reads Python."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels import executor

if not executor.interpreted():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

from bench.tools.interpreter import FailedAssert, Overflow, Unsupported


@triton.jit
def _integers(out_ptr, a, b, OP: tl.constexpr):
    if OP == "mul":
        z = a * b
    elif OP == "add":
        z = a + b
    elif OP == "wide":
        z = a.to(tl.int64) * b
    elif OP == "wrap":
        z = tl.mul(a, b, sanitize_overflow=False)
    elif OP == "sum":
        z = tl.sum(tl.full([4], 1, tl.int32) * a, 0)
    elif OP == "assert":
        tl.device_assert(a < b, "a must be below b")
        z = a
    tl.store(out_ptr, z)


@pytest.mark.parametrize("op", ["mul", "add", "sum"])
def test_int32_overflow_is_caught(op: str) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    big = 2**30 if op != "mul" else 2**16
    with pytest.raises(
        Overflow, match=r"_integers, program \(0, 0, 0\), test_interpreter_language.py:\d+: .*int32 overflow"
    ):
        _integers[(1,)](out, big, big, OP=op)


def test_overflow_that_is_meant_or_avoided_passes() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    _integers[(1,)](out, 2**16, 2**16, OP="wide")
    assert out.item() == 2**32
    _integers[(1,)](out, 2**16, 2**16 + 1, OP="wrap")
    assert out.item() == 2**16


def test_device_assert_is_on() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    _integers[(1,)](out, 1, 2, OP="assert")
    with pytest.raises(FailedAssert, match="a must be below b"):
        _integers[(1,)](out, 2, 1, OP="assert")


@triton.jit
def _scalars(out_ptr, flag, x, n, LOGIC: tl.constexpr):
    i = tl.arange(0, 8)
    total = tl.zeros([8], tl.float32)
    for _ in range(n):
        total += x.to(tl.float32)
    if flag and n > 1:
        total += 100
    if LOGIC == "and":
        total = tl.where(i > 1 and i < 4, total, -1.0)
    elif LOGIC == "not":
        total = tl.where(not (i < 4), total, -1.0)
    elif LOGIC == "if" and i < 4:
        total += 1
    tl.store(out_ptr + i, total)


@pytest.mark.parametrize("logic, expected", [("and", [-1] * 2 + [101] * 2 + [-1] * 4), ("not", [-1] * 4 + [101] * 4)])
def test_logic_of_blocks_and_scalars(logic: str, expected: list[int]) -> None:
    """Loop bounds and conditions from arguments; `and`, `not` elementwise, where Python sees one truth value."""
    out = torch.zeros(8)
    _scalars[(1,)](out, True, 0.5, 2, LOGIC=logic)
    assert out.tolist() == expected
    _scalars[(1,)](out, False, 0.5, 2, LOGIC=logic)
    assert out.tolist() == [min(value, 1) for value in expected]


def test_block_as_condition_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"block of shape \(8,\) as a condition"):
        _scalars[(1,)](torch.zeros(8), False, 0.5, 2, LOGIC="if")


@triton.jit
def _chained(out_ptr):
    i = tl.arange(0, 8)
    tl.store(out_ptr + i, 1 < i < 4)


def test_chain_of_comparisons_is_refused() -> None:
    with pytest.raises(Unsupported, match="chain of comparisons"):
        _chained[(1,)](torch.zeros(8))


@triton.jit
def _copy(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


def test_unknown_options_and_grids_are_refused() -> None:
    x = torch.zeros(8)
    with pytest.raises(Unsupported, match="called BLCK"):
        _copy[(1,)](x, x, BLOCK=8, BLCK=8)
    with pytest.raises(Unsupported, match="grid"):
        _copy[(1, 70000)](x, x, BLOCK=8)
    _copy[(1,)](x, x, BLOCK=8, num_warps=4, num_stages=2)
