"""Reductions and scans as trees, rounded at every step as on a GPU; they keep the order and call any function."""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as base

from bench.tools.interpreter import state
from bench.tools.interpreter.builder import Handle
from bench.tools.interpreter.defects import Overflow
from bench.tools.interpreter.formats import POISON_INT, Array, is_poison, poison_like

Combine = Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[Array, ...]]


def _wrap(data: Array, dtype: tl.dtype) -> Any:
    """Return a tensor of `dtype`; a scalar if `data` has no axes."""
    if data.ndim == 0:
        return tl.core.tensor(Handle(data.reshape(1), dtype), dtype)
    return tl.core.tensor(Handle(np.ascontiguousarray(data), dtype), tl.block_type(dtype, list(data.shape)))


def _called(function: Any, dtypes: list[tl.dtype]) -> Combine:
    """Return the combine function of a kernel, on whole arrays at once."""

    def combine(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        shape = left[0].shape
        parts = [
            _wrap(np.atleast_1d(x), dtype) for side in (left, right) for x, dtype in zip(side, dtypes, strict=True)
        ]
        result = function.fn(*parts)
        result = result if isinstance(result, tuple) else (result,)
        return tuple(np.broadcast_to(r.handle.data, np.atleast_1d(left[0]).shape).reshape(shape) for r in result)

    return combine


def _elementwise(ufunc: Callable[..., Array], dtype: tl.dtype) -> Combine:
    """One numpy function of two arrays that keeps poison; for formats that numpy has."""

    def combine(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        (a,), (b,) = left, right
        result = ufunc(a, b)
        if state.poured():
            lost = is_poison(a, dtype) | is_poison(b, dtype)
            if lost.any():
                result = np.where(lost, poison_like(result.shape, dtype, result.dtype), result)
        return (result,)

    return combine


def _integers(data: Array, *, running: bool) -> Array:
    """Sum over axis 0, or all its running sums: raises Overflow instead of wrapping, passes poison on."""
    add, either = (f.accumulate if running else f.reduce for f in (np.add, np.logical_or))
    small = data.dtype.itemsize < 8 or np.abs(data.astype(np.float64)).sum() < 2.0**62
    total = add(data.astype(np.int64 if small else object), axis=0)
    lost = np.zeros(total.shape, np.bool_)
    if state.poured() and data.dtype.itemsize >= 4:
        lost = np.asarray(either(data == POISON_INT, axis=0))
    info = np.iinfo(data.dtype)
    if np.any(((total < info.min) | (total > info.max)) & ~lost):
        raise Overflow(f"{data.dtype} overflow in a sum of {data.shape[0]} values")
    return np.where(lost, POISON_INT, total).astype(data.dtype)


def _sums_integers(function: Any, dtypes: list[tl.dtype]) -> bool:
    return function is tl.standard._sum_combine and dtypes[0].is_int() and dtypes[0] != tl.int1


def _chosen(function: Any, dtypes: list[tl.dtype]) -> Combine:
    """Return the fast form of a combine function of Triton's own, or the function itself."""
    plain = len(dtypes) == 1 and dtypes[0] in (tl.float16, tl.float32, tl.float64)
    known = {
        id(tl.standard._sum_combine): np.add,
        id(tl.standard._elementwise_max): np.fmax,
        id(tl.standard._elementwise_min): np.fmin,
    }
    ufunc = known.get(id(function)) if plain else None
    return _elementwise(ufunc, dtypes[0]) if ufunc else _called(function, dtypes)


class Reduce(base.ReduceOps):
    """`tl.reduce`, and with it `tl.sum`, `tl.max`, `tl.argmax`, ..."""

    def apply_impl(self, input: tuple[Any, ...]) -> list[Any]:
        """Combine neighbours until one is left along the axis; without an axis, of everything."""
        dtypes = [x.dtype for x in input]
        rank = input[0].handle.data.ndim
        if self.axis is None:
            arrays = tuple(x.handle.data.reshape(-1) for x in input)
        else:
            arrays = tuple(np.moveaxis(x.handle.data, int(self.axis), 0) for x in input)
        if _sums_integers(self.combine_fn, dtypes):
            arrays = (_integers(arrays[0], running=False)[None],)
        combine = _chosen(self.combine_fn, dtypes)
        while arrays[0].shape[0] > 1:
            arrays = combine(tuple(x[0::2] for x in arrays), tuple(x[1::2] for x in arrays))
        results = [x[0] for x in arrays]
        if self.keep_dims:
            results = [
                x.reshape((1,) * rank) if self.axis is None else np.expand_dims(x, int(self.axis)) for x in results
            ]
        return [_wrap(np.asarray(x), dtype) for x, dtype in zip(results, dtypes, strict=True)]


class Scan(base.ScanOps):
    """`tl.associative_scan`, and with it `tl.cumsum`, `tl.cumprod`."""

    def apply_impl(self, input: tuple[Any, ...]) -> list[Any]:
        """Each value combined with all before it: in blocks of 2, 4, 8, ... the second half with the first's end."""
        dtypes = [x.dtype for x in input]
        arrays = tuple(np.moveaxis(x.handle.data, int(self.axis), 0) for x in input)
        arrays = tuple(x[::-1] for x in arrays) if self.reverse else arrays
        if _sums_integers(self.combine_fn, dtypes):
            arrays = (_integers(arrays[0], running=True),)
        else:
            arrays = self._tree(arrays, _chosen(self.combine_fn, dtypes))
        arrays = tuple(x[::-1] for x in arrays) if self.reverse else arrays
        return [_wrap(np.moveaxis(x, 0, int(self.axis)), dtype) for x, dtype in zip(arrays, dtypes, strict=True)]

    def _tree(self, arrays: tuple[Array, ...], combine: Combine) -> tuple[Array, ...]:
        shape, half = arrays[0].shape, 1
        while half < shape[0]:
            blocks = [x.reshape(-1, 2 * half, *shape[1:]) for x in arrays]
            ends = tuple(np.broadcast_to(x[:, half - 1 : half], x[:, half:].shape) for x in blocks)
            later = combine(ends, tuple(x[:, half:] for x in blocks))
            arrays = tuple(
                np.concatenate((x[:, :half], y), 1).reshape(shape) for x, y in zip(blocks, later, strict=True)
            )
            half *= 2
        return arrays
