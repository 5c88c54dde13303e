"""The order in which the programs of a launch run. A correct kernel gives the same bits in all of them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from bench.tools.interpreter import state

Index = tuple[int, int, int]

ORDERS = ("forward", "reverse", "shuffled", "interleaved")
_RESIDENT = 8  # programs that an interleaved launch has under way at once
_SWITCH = 0.5  # chance that a program is interrupted at a memory access

_order, _seed = "shuffled", 0


@contextmanager
def program_order(order: str, seed: int = 0) -> Iterator[None]:
    """Run the programs of launches inside in another order.

    `forward` and `reverse` of the linear index, `shuffled` (the default elsewhere), or `interleaved`: several programs
    are under way and take turns at random, at their loads, stores and atomics.
    """
    global _order, _seed
    if order not in ORDERS:
        raise ValueError(f"order: {order!r} is unknown, use one of {', '.join(ORDERS)}")
    kept, (_order, _seed) = (_order, _seed), (order, seed)
    try:
        yield
    finally:
        _order, _seed = kept


def generator() -> np.random.Generator:
    """Randomness of one launch: the same for every launch under the same seed."""
    return np.random.default_rng(_seed)


def run(grid: Index, launch: state.Launch, program: Callable[[], None]) -> None:
    """Call `program` for every index of the grid, with `state.program.index` set to it."""
    indices = [(int(x), int(y), int(z)) for x, y, z in np.ndindex(*grid)]
    if _order == "reverse":
        indices.reverse()
    elif _order != "forward":
        indices = [indices[i] for i in launch.rng.permutation(len(indices))]
    if _order == "interleaved" and len(indices) > 1:
        _Interleaved(launch, program).run(indices)
        return
    for index in indices:
        state.program.index = index
        program()


class _Abandoned(BaseException):
    """Unwinds the programs that are under way when one of them has failed."""


class _Worker(threading.Thread):
    """One program under way. It runs only between `go` being released and its releasing of the baton."""

    def __init__(self, owner: "_Interleaved", index: Index) -> None:
        super().__init__(daemon=True)
        self.owner, self.index = owner, index
        self.go = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.over = False

    def run(self) -> None:
        """Run the programs: the thread's body."""
        self.go.acquire()
        state.program.index = self.index
        try:
            if not self.owner.failed:
                self.owner.program()
        except BaseException as error:  # handed on by the scheduler, whatever it is
            self.error = error
        self.over = True
        self.owner.baton.release()


class _Interleaved:
    """Programs in threads of which exactly one runs at any time."""

    def __init__(self, launch: state.Launch, program: Callable[[], None]) -> None:
        self.launch, self.program = launch, program
        self.baton = threading.Semaphore(0)
        self.running: _Worker | None = None
        self.failed = False

    def run(self, indices: list[Index]) -> None:
        """Run them all; raise the first error."""
        waiting, live = indices[::-1], list[_Worker]()
        self.launch.pause = self._pause
        while waiting or live:
            while waiting and len(live) < _RESIDENT:
                live.append(_Worker(self, waiting.pop()))
                live[-1].start()
            worker = live[int(self.launch.rng.integers(len(live)))]
            self._resume(worker)
            if worker.over:
                live.remove(worker)
                if worker.error is not None:
                    self._abandon(live)
                    state.program.index = worker.index
                    raise worker.error

    def _resume(self, worker: _Worker) -> None:
        self.running = worker
        worker.go.release()
        self.baton.acquire()

    def _pause(self) -> None:
        worker = self.running
        assert worker is not None
        if self.launch.rng.random() < _SWITCH:
            self.baton.release()
            worker.go.acquire()
        if self.failed:
            raise _Abandoned

    def _abandon(self, live: list[_Worker]) -> None:
        self.failed = True
        for worker in live:
            while not worker.over:
                self._resume(worker)
