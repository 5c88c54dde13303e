"""Loads, stores and atomics: every active pointer is checked against the argument it came from.

A pointer carries the number of its argument in the 16 bits that addresses leave free, through all arithmetic. So a
pointer that leaves its tensor is caught even where it lands in another one.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter as base

from bench.tools.interpreter import state
from bench.tools.interpreter.defects import Disagreement, OutOfBounds, Unsupported
from bench.tools.interpreter.formats import poison_like

_TAG_BITS = 48
_ADDRESS = np.uint64((1 << _TAG_BITS) - 1)
_SHOWN = 3  # offending lanes spelt out in a message

Handle = base.TensorHandle


def describe(name: str, tensor: Tensor) -> state.Argument:
    """Return the argument `name`, from the tensor as the kernel gets it (a view counts for what it shows)."""
    item = tensor.element_size()
    dims = sorted(
        ((stride * item, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1),
        reverse=True,
    )
    extent = sum(stride * (size - 1) for stride, size in dims) + item if tensor.numel() else 0
    dense, nested = item, True
    for stride, size in reversed(dims):
        nested &= stride == 0 or stride >= dense
        dense = max(dense, stride * (size - 1) + dense)
    steps = tuple((stride, size) for stride, size in dims if stride)
    holes = nested and extent > item * int(np.prod([size for stride, size in dims if stride], dtype=np.int64))
    return state.Argument(name, tensor, tensor.data_ptr(), extent, item, steps if holes else ())


def tag(address: NDArray[np.uint64], index: int) -> NDArray[np.uint64]:
    """Return the pointer with the number of its argument in it."""
    return address | np.uint64((index + 1) << _TAG_BITS)


def bare(pointers: Any) -> Any:
    """Return the handle with plain addresses."""
    return Handle(pointers.data & _ADDRESS, pointers.dtype)


def _element(pointers: Any) -> tuple[tl.dtype, np.dtype]:
    element = pointers.get_element_ty()
    return element, base._get_np_dtype(element)


def _named(offset: int, argument: state.Argument) -> str:
    """`offset` in bytes as an index of the argument, as far as it has one."""
    element, rest = divmod(offset, argument.item)
    return f"element {element}" + (f" and {rest} bytes" if rest else "")


def check(
    kind: str, pointers: NDArray[np.uint64], mask: NDArray[np.bool_], size: int, program: tuple[int, int, int]
) -> None:
    """Raise OutOfBounds unless every active pointer lies in its argument; tell the listeners; may switch programs."""
    launch = state.current
    assert launch is not None, "memory access outside a launch"
    active = pointers[mask]
    if active.size:
        tags = (active >> np.uint64(_TAG_BITS)).astype(np.int64)
        for number in np.unique(tags).tolist():
            if not 1 <= number <= len(launch.arguments):
                raise OutOfBounds(f"{kind}: {int((tags == number).sum())} active lanes do not point into any argument")
            argument = launch.arguments[number - 1]
            mine = active[tags == number]
            offsets = (mine & _ADDRESS).astype(np.int64) - argument.start
            good = argument.belongs(offsets, size)
            if not good.all():
                raise OutOfBounds(_out_of_bounds(kind, argument, offsets[~good], good.size))
            for listener in state.listeners:
                listener(state.Access(kind, launch.kernel, argument.name, argument.tensor, offsets, size, program))
    launch.pause()


def _out_of_bounds(kind: str, argument: state.Argument, bad: NDArray[np.int64], lanes: int) -> str:
    shown = ", ".join(_named(offset, argument) for offset in bad[:_SHOWN].tolist()) + (
        ", ..." if bad.size > _SHOWN else ""
    )
    tensor = argument.tensor
    layout = "" if tensor.is_contiguous() else f" with strides {tuple(tensor.stride())}"
    return (
        f"{kind}: {bad.size} of {lanes} active lanes leave argument {argument.name!r}, "
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{layout}: "
        f"{shown} of {argument.extent // argument.item}"
    )


def _lanes(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    data = mask.data if isinstance(mask, Handle) else np.asarray(mask)
    return np.broadcast_to(data, shape)


class Memory(base.InterpreterBuilder):
    """The memory operations of the repaired interpreter."""

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        """Return a load whose switched-off lanes hold `other`, or poison where the kernel gave none."""
        element, np_dtype = _element(ptrs)
        lanes = _lanes(mask, ptrs.data.shape)
        check("load", ptrs.data, lanes, np_dtype.itemsize, self.grid_idx)
        if other is None and not lanes.all():
            assert state.current is not None
            state.current.poured = True
            other = Handle(poison_like(ptrs.data.shape, element, np_dtype), element)
        return super().create_masked_load(bare(ptrs), Handle(lanes, tl.int1), other, *rest, **options)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        """Return a store; lanes that share an address must agree."""
        _, np_dtype = _element(ptrs)
        lanes = _lanes(mask, ptrs.data.shape)
        check("store", ptrs.data, lanes, np_dtype.itemsize, self.grid_idx)
        data = np.ascontiguousarray(np.broadcast_to(value.data, ptrs.data.shape), dtype=np_dtype)
        _agree(ptrs.data[lanes], data[lanes])
        return super().create_masked_store(
            bare(ptrs), Handle(data, value.dtype), Handle(lanes, tl.int1), *rest, **options
        )

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
        """Compare and swap."""
        check("atomic", ptr.data, np.ones(ptr.data.shape, np.bool_), _element(ptr)[1].itemsize, self.grid_idx)
        return super().create_atomic_cas(bare(ptr), cmp, val, *rest)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        """Read, modify, write, for integers; the old value in switched-off lanes is poison."""
        element, np_dtype = _element(ptr)
        if np_dtype.kind == "f" or element.is_floating():
            raise Unsupported(f"floating-point atomic on {element}: its result depends on the order of programs")
        lanes = _lanes(mask, ptr.data.shape)
        check("atomic", ptr.data, lanes, np_dtype.itemsize, self.grid_idx)
        old = super().create_atomic_rmw(rmwOp, bare(ptr), val, Handle(np.ascontiguousarray(lanes), tl.int1), *rest)
        if lanes.all():
            return old
        assert state.current is not None
        state.current.poured = True
        return Handle(np.where(lanes, old.data, poison_like(lanes.shape, element, np_dtype)), old.dtype)


def _agree(addresses: NDArray[np.uint64], values: NDArray[Any]) -> None:
    """Raise Disagreement if one address is given two values."""
    if addresses.size < 2:
        return
    order = np.argsort(addresses, kind="stable")
    sorted_addresses, bits = addresses[order], values[order].view(f"u{values.dtype.itemsize}")
    clash = (sorted_addresses[1:] == sorted_addresses[:-1]) & (bits[1:] != bits[:-1])
    if clash.any():
        raise Disagreement(
            f"store: {int(clash.sum())} lanes write a value to an address where another lane writes a different one"
        )


def tensor_of(argument: Any) -> Tensor | None:
    """Return the tensor behind an argument that is one, or wraps one."""
    inner = base._unwrap_tensor(argument)
    return inner if isinstance(inner, torch.Tensor) else None
