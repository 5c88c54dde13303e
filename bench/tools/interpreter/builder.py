"""Arithmetic: every operation in the format it is said to be in, and integer overflow caught."""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as base

from bench.tools.interpreter import state
from bench.tools.interpreter.defects import FailedAssert, Overflow
from bench.tools.interpreter.formats import Array, is_packed, is_poison, narrow, poison_like, to_int, widen
from bench.tools.interpreter.memory import Handle, Memory

_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_TF32_MASK = np.uint32(0xFFFFE000)
_WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _poisoned(*handles: Any) -> Array | np.bool_:
    """Lanes in which an operand is poison. Only meaningful once something has been poisoned."""
    masks = [is_poison(handle.data, handle.dtype.scalar) for handle in handles]
    result = masks[0]
    for mask in masks[1:]:
        result = result | mask
    return result


def _finish(values: Array, dtype: tl.dtype, *operands: Any) -> Any:
    """Return a handle of `dtype` with `values` rounded to it, and poison wherever an operand was poison."""
    target = base._get_np_dtype(dtype)
    data = narrow(values, dtype) if is_packed(dtype) else values.astype(target, copy=False)
    if state.poured():
        lost = _poisoned(*operands)
        if lost.any():
            data = np.where(lost, poison_like(data.shape, dtype, target), data)
    return Handle(data, dtype)


class Builder(Memory):
    """Triton's interpreter builder with its arithmetic put right."""

    def __init__(self) -> None:
        super().__init__()
        self.options = base.InterpreterOptions(debug=True)
        self.codegen_fns["min_dot_size"] = _smallest_dot

    @property
    def grid_idx(self) -> tuple[int, int, int]:
        """The program that runs now: each thread of an interleaved launch has its own."""
        return state.program.index

    @grid_idx.setter
    def grid_idx(self, index: tuple[int, int, int]) -> None:
        state.program.index = index

    # constants that Triton's own lacks

    def get_bf16(self, value: float) -> Any:
        """Return a bf16 constant."""
        return Handle(narrow(np.array([value], np.float32), tl.bfloat16), tl.bfloat16)

    def get_all_ones_value(self, type: Any) -> Any:
        """All bits set."""
        dtype = base._get_np_dtype(type)
        ones = np.ones(1, dtype) if dtype.kind == "b" else np.full(1, -1, np.int64).astype(dtype)
        return Handle(ones, type.scalar)

    # casts: create_fp_ext, create_si_to_fp and the like all end in cast_impl

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        """Any value to any scalar type."""
        return self._convert(src, dst_type.scalar, to_zero=False)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        """Float to float, with an explicit rounding mode."""
        return self._convert(src, dst_type.scalar, to_zero=rounding_mode == ir.ROUNDING_MODE.RTZ)

    def _convert(self, src: Any, target: tl.dtype, to_zero: bool) -> Any:
        source = src.dtype.scalar
        if source == target or target.is_ptr():
            return Handle(src.data, target)
        values, np_target = widen(src.data, source), base._get_np_dtype(target)
        if target.is_floating():
            if values.dtype.kind != "f":  # one rounding: float64 holds all integers but those of 64 bits
                wide = np.float32 if values.dtype.itemsize == 8 and target != tl.float64 else np.float64
                values = values.astype(wide)
            data = narrow(values, target, to_zero=to_zero)
        elif np_target.kind == "b":
            data = values != 0
        elif values.dtype.kind == "f":
            data = to_int(values, np_target)
        else:
            data = values.astype(np_target)
        return _finish_raw(data, target, src)

    # elementwise

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Any:
        """`op` in the operands' format; comparisons give booleans."""
        dtype = lhs.dtype.scalar
        left, right = widen(lhs.data, dtype), widen(rhs.data, rhs.dtype.scalar)
        if op in _COMPARISONS:
            result = op(left, right)
            if state.poured():
                lost = _poisoned(lhs, rhs)
                if lost.any():  # what comes of comparing garbage is anybody's guess
                    assert state.current is not None
                    result = np.where(lost, state.current.rng.random(result.shape) < 0.5, result)
            return Handle(result, tl.int1)
        if left.dtype == right.dtype == np.bool_ and op not in _BITWISE:
            return Handle((op(left.astype(np.int8), right.astype(np.int8)) & 1).astype(np.bool_), dtype)
        return _finish(op(left, right), dtype, lhs, rhs)

    def create_idiv(self, lhs: Any, rhs: Any) -> Any:
        """Integer division towards zero; dividing by zero gives all ones, as on NVIDIA."""
        zero = rhs.data == 0
        safe = np.where(zero, 1, rhs.data).astype(rhs.data.dtype)
        quotient = (lhs.data - np.fmod(lhs.data, safe)) // safe
        return _finish(np.where(zero, self.get_all_ones_value(lhs.dtype).data, quotient), lhs.dtype.scalar, lhs, rhs)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        """Minimum; a NaN loses against a number, as on GPUs."""
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        """Maximum; a NaN loses against a number, as on GPUs."""
        return self.binary_op(lhs, rhs, np.fmax)

    def create_umulhi(self, lhs: Any, rhs: Any) -> Any:
        """High half of the product of the operands' bits, read as unsigned numbers."""
        dtype, size = lhs.data.dtype, lhs.data.dtype.itemsize
        left, right = (np.ascontiguousarray(h.data).view(f"u{size}") for h in (lhs, rhs))
        if size == 8:
            data = _high64(left, right)
        else:
            data = ((left.astype(np.uint64) * right.astype(np.uint64)) >> np.uint64(8 * size)).astype(f"u{size}")
        return _finish(data.view(dtype), lhs.dtype.scalar, lhs, rhs)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        """`min(max(arg, lo), hi)`, with NaN ignored or kept."""
        low, high = (np.fmax, np.fmin) if propagate_nans == ir.PROPAGATE_NAN.NONE else (np.maximum, np.minimum)
        return self.binary_op(self.binary_op(arg, lo, low), hi, high)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        """`x * y + z` in fp64, rounded once more: exact but for fp64's own ties."""
        a, b, c = (widen(h.data, h.dtype.scalar).astype(np.float64) for h in (x, y, z))
        return _finish(a * b + c, z.dtype.scalar, x, y, z)

    def unary_op(self, arg: Any, op: Callable[..., Array]) -> Any:
        """`op` in the operand's format."""
        return _finish(op(widen(arg.data, arg.dtype.scalar)), arg.dtype.scalar, arg)

    def create_rsqrt(self, arg: Any) -> Any:
        """`1 / sqrt(arg)`."""
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    # matrix product

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        """Return `a @ b + d`. fp32 operands lose what tf32 has no room for, unless the kernel asked for more."""
        left, right = widen(a.data, a.dtype.scalar), widen(b.data, b.dtype.scalar)
        if left.dtype == np.float32 and a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            left, right = (np.ascontiguousarray(x).view(np.uint32) & _TF32_MASK for x in (left, right))
            left, right = left.view(np.float32), right.view(np.float32)
        # A BLAS sums in an order that depends on the shapes; rounded from fp64, no element depends on its neighbours.
        wide = np.int32 if left.dtype.kind in "iu" else np.float64
        product = np.matmul(left.astype(wide), right.astype(wide))
        return Handle((product + d.data.astype(wide)).astype(d.data.dtype), d.dtype.scalar)

    # assertions

    def create_assert(self, condition: Any, message: str) -> None:
        """`tl.device_assert`."""
        if not condition.data.all():
            raise FailedAssert(f"device_assert fails in {int((~condition.data).sum())} lanes: {message}")

    def create_assume(self, condition: Any) -> None:
        """`tl.assume`."""
        if not condition.data.all():
            raise FailedAssert("assume: the condition does not hold")


def _finish_raw(data: Array, dtype: tl.dtype, source: Any) -> Any:
    """As `_finish`, for data that is in the format already."""
    if state.poured():
        lost = is_poison(source.data, source.dtype.scalar)
        if lost.any():
            data = np.where(lost, poison_like(data.shape, dtype, base._get_np_dtype(dtype)), data)
    return Handle(data, dtype)


def _high64(left: Array, right: Array) -> Array:
    """High 64 bits of 128-bit products."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a1, a0, b1, b0 = left >> half, left & mask, right >> half, right & mask
    middle = a1 * b0 + ((a0 * b0) >> half)
    low = a0 * b1 + (middle & mask)
    return a1 * b1 + (middle >> half) + (low >> half)


def _smallest_dot(lhs: Any, rhs: Any) -> tuple[int, int, int]:
    """Smallest M, N, K that NVIDIA's backends of Triton 3.5 and later all accept."""
    return (1, 1, 32 if lhs.scalar.primitive_bitwidth == 8 else 16)


class Semantic(TritonSemantic):
    """Triton's semantics with a cheaper and better-spoken overflow check."""

    def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
        """Raise Overflow if a sum, difference or product of integers below 64 bits wraps around."""
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64 or kind.int_bitwidth == 1:
            return
        left, right = lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64)
        result = _WIDE[binary_op.__name__](left, right)
        bad = (result < kind.get_int_min_value()) | (result > kind.get_int_max_value())
        if state.poured() and bad.any():
            bad = bad & ~_poisoned(lhs.handle, rhs.handle)
        if bad.any():
            first = np.unravel_index(int(np.argmax(bad)), bad.shape)
            a, b = (np.broadcast_to(x, bad.shape)[first] for x in (left, right))
            raise Overflow(
                f"{kind} overflow in {binary_op.__name__} of {a} and {b}, in {int(bad.sum())} of {bad.size} lanes"
            )
