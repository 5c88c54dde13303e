"""Number formats as Triton defines them, on numpy arrays of raw bits: conversions, and what poison looks like.

bf16 lives in uint16 arrays and fp8 in uint8 arrays, as in Triton's interpreter.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray

Array = NDArray[Any]

# The value of a switched-off lane. A NaN whose payload survives conversion between all float formats, so that it can
# be told from other NaNs; for integers one that makes every address absurd, and that arithmetic passes on.
POISON_INT = 0x7EADBEEF
_POISON_BITS = {2: 0x7F50, 4: 0x7FEA0000, 8: 0x7FFD4000_00000000}  # fp16, fp32, fp64, by bytes
_POISON_MASK = {2: 0x7FFF, 4: 0x7FFF0000, 8: 0x7FFFE000_00000000}
_POISON_BF16 = 0x7FEA

_FP8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}


def is_packed(dtype: tl.dtype) -> bool:
    """Return True if arrays of this type hold bits of a float format that numpy lacks."""
    return dtype == tl.bfloat16 or dtype in _FP8


def widen(data: Array, dtype: tl.dtype) -> Array:
    """Values to compute with: float32 for bf16 and fp8 (exact), anything else as it is."""
    if data.dtype == np.bool_:
        return data
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in _FP8:
        bits = torch.from_numpy(np.array(data, dtype=np.uint8))
        return bits.view(_FP8[dtype]).to(torch.float32).numpy()
    return data


def narrow(data: Array, dtype: tl.dtype, *, to_zero: bool = False) -> Array:
    """Round floats to `dtype`: to nearest even, or towards zero. Overflow gives inf, in fp8 the largest value.

    fp8 saturates because the conversion instructions that Triton emits do.
    """
    if dtype == tl.bfloat16:
        return _to_bf16(_to_fp32(data, odd=not to_zero), to_zero)
    if dtype in _FP8:
        fp8 = _FP8[dtype]
        wide = torch.from_numpy(np.array(data, dtype=np.float32))
        largest = torch.finfo(fp8).max
        return wide.clamp(-largest, largest).to(fp8).view(torch.uint8).numpy()
    target = np.dtype({tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}[dtype])
    rounded = data.astype(target)
    if to_zero and target.itemsize < data.dtype.itemsize:
        over = np.isfinite(data) & (np.abs(rounded.astype(data.dtype)) > np.abs(data))
        rounded = np.where(over, np.nextafter(rounded, target.type(0)), rounded)
    return rounded


def _to_fp32(data: Array, odd: bool) -> Array:
    """float32 for a further rounding. Where fp64 is inexact, the last bit is made odd: no double rounding."""
    with np.errstate(over="ignore"):
        single = data.astype(np.float32)
    if data.dtype != np.float64:
        return single
    if not odd:
        over = np.isfinite(data) & (np.abs(single.astype(np.float64)) > np.abs(data))
        return np.where(over, np.nextafter(single, np.float32(0)), single)
    error = data - single.astype(np.float64)
    bits = np.ascontiguousarray(single).view(np.uint32)
    even = (bits & np.uint32(1)) == 0
    away = (error > 0) == (data > 0)
    moved = np.where(away, bits + np.uint32(1), bits - np.uint32(1))
    inexact = np.isfinite(single) & (error != 0) & even & (bits << np.uint32(1) != 0)
    return np.where(inexact, moved, bits).astype(np.uint32).view(np.float32)


def _to_bf16(single: Array, to_zero: bool) -> Array:
    bits = np.ascontiguousarray(single).view(np.uint32)
    half = np.uint32(0) if to_zero else ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return np.where(np.isnan(single), quiet, rounded).astype(np.uint16).reshape(single.shape)


def to_int(data: Array, target: np.dtype) -> Array:
    """Float to integer as GPUs convert: towards zero, saturating, NaN to 0."""
    info = np.iinfo(target)
    wide = np.trunc(data.astype(np.float64))
    low, high = wide <= float(info.min), wide >= float(info.max)
    inside = np.where(low | high | np.isnan(wide), 0.0, wide).astype(target)
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(target)


def poison_like(shape: tuple[int, ...], dtype: tl.dtype, np_dtype: np.dtype) -> Array:
    """Poison for values of `dtype`: NaN, or an extreme integer; booleans alternate."""
    if dtype == tl.bfloat16:
        return np.full(shape, _POISON_BF16, np.uint16)
    if np_dtype.kind == "f":
        return np.full(shape, _POISON_BITS[np_dtype.itemsize], f"u{np_dtype.itemsize}").view(np_dtype)
    if np_dtype.kind == "b":
        return (np.arange(int(np.prod(shape))) % 2 == 0).reshape(shape)
    if dtype in _FP8 or np_dtype.itemsize < 4:
        return np.full(shape, np.iinfo(np_dtype).max, np_dtype)
    return np.full(shape, POISON_INT, np_dtype)


def is_poison(data: Array, dtype: tl.dtype) -> Array:
    """Return a mask of poison. Always False for booleans and for integers of less than 32 bits."""
    if dtype == tl.bfloat16 and data.dtype == np.uint16:
        return (data & np.uint16(0x7FFF)) == _POISON_BF16
    if data.dtype.kind == "f":
        size = data.dtype.itemsize
        unsigned = np.dtype(f"u{size}").type
        return (np.ascontiguousarray(data).view(f"u{size}") & unsigned(_POISON_MASK[size])).reshape(
            data.shape
        ) == unsigned(_POISON_BITS[size])
    if data.dtype.kind in "iu" and data.dtype.itemsize >= 4:
        return data == data.dtype.type(POISON_INT)
    return np.zeros(data.shape, np.bool_)
