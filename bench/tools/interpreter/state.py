"""The launch that is running: its arguments, what has been poisoned, who listens to its memory accesses."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Argument:
    """A tensor argument: where it lies, and which bytes of its extent belong to it."""

    name: str
    tensor: Tensor
    start: int
    extent: int  # bytes from the first element's first to the last element's last
    item: int  # bytes per element
    steps: tuple[tuple[int, int], ...]  # (stride in bytes, size), largest stride first; empty if every byte belongs

    def belongs(self, offsets: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
        """Return a mask of accesses of `size` bytes at byte offsets that touch nothing but elements of the tensor."""
        inside = (offsets >= 0) & (offsets + size <= self.extent)
        if not self.steps:
            return inside
        first, last = offsets, offsets + size - 1
        return inside & self._on_element(first) & self._on_element(last)

    def _on_element(self, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        rest = offsets
        for stride, size in self.steps:
            rest = rest - np.minimum(rest // stride, size - 1) * stride
        return rest < self.item


@dataclass(frozen=True)
class Access:
    """One load, store or atomic of one program, as a listener sees it: active lanes only."""

    kind: str  # "load", "store" or "atomic"
    kernel: str
    argument: str
    tensor: Tensor
    offsets: NDArray[np.int64]  # byte offsets from the argument's first element
    size: int  # bytes per lane
    program: tuple[int, int, int]


@dataclass
class Launch:
    """State of one kernel launch."""

    kernel: str
    arguments: list[Argument]
    rng: np.random.Generator
    poured: bool = False  # whether any lane has been poisoned: until then nothing needs to look for poison
    pause: Callable[[], None] = field(default=lambda: None)  # lets other programs run


class _Program(threading.local):
    """Index of the program that this thread runs."""

    index: tuple[int, int, int] = (0, 0, 0)


Listener = Callable[[Access], None]

program = _Program()
current: Launch | None = None
listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` with every memory access of every interpreted kernel, before it happens."""
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)


def poured() -> bool:
    """Return True if the running launch may hold poison."""
    return current is not None and current.poured
