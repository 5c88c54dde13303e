"""A device with a clock of its own: what the engine launches is computed at once, but ends when its time has come.

The host's time goes on by `HOST` for each step it launches, and by `CALL` for whatever else it asks of the device; when
it waits, to the moment it waits for. The device works its stream off in order, `step` seconds for each decode step.
A copy to the host shows garbage until somebody has seen an event behind it.
"""

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

HOST, CALL, COPY = 70e-6, 2e-6, 5e-6
GARBAGE = -(1 << 30)


class VirtualEvent:
    def __init__(self, device: "VirtualDevice") -> None:
        self.device, self.at = device, device.free_at

    def done(self) -> bool:
        self.device.clock += CALL
        return self.at <= self.device.clock and self.device.seen(self.at)

    def wait(self) -> None:
        self.device.clock = max(self.device.clock, self.at)
        self.device.seen(self.at)


class VirtualDevice:
    """In place of a GPU. step: seconds of a decode step on the device."""

    torch = torch.device("cpu")
    poll_every = 2

    def __init__(self, step: float) -> None:
        self.step = step
        self.clock = self.free_at = 0.0
        self.launches: list[float] = []  # when each step ends
        self.in_flight = self.uploads = 0
        self.outside: list[str] = []  # what was launched while the engine's stream was not the current one
        self._copies: list[tuple[float, int, Tensor, Tensor]] = []
        self._active = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    def launch(self, step: Callable[[], None]) -> None:
        self._note("step")
        self.clock += HOST
        step()
        self._busy(self.step)
        self.launches.append(self.free_at)
        self.in_flight = max(self.in_flight, sum(end > self.clock for end in self.launches[-4096:]))

    def event(self) -> VirtualEvent:
        self._note("event")
        return VirtualEvent(self)

    def caller_mark(self) -> Any:
        return None

    def follow(self, mark: Any) -> None:
        pass

    def staging(self, *shape: int) -> Tensor:
        return torch.full(shape, GARBAGE, dtype=torch.int32)

    def to_host(self, source: Tensor, target: Tensor) -> None:
        self._note("copy")
        self._busy(COPY)
        target.fill_(GARBAGE)
        heapq.heappush(self._copies, (self.free_at, len(self.launches), target, source.clone()))

    def upload(self, values: Tensor) -> Tensor:
        self._note("upload")
        self.uploads += 1
        self._busy(COPY)
        return values.clone()

    def now(self) -> float:
        return self.clock

    def seen(self, at: float) -> bool:
        """The host knows that the device has come this far: the copies up to there can be read."""
        while self._copies and self._copies[0][0] <= at:
            _, _, target, values = heapq.heappop(self._copies)
            target.copy_(values)
        return True

    def _busy(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.clock) + seconds

    def _note(self, what: str) -> None:
        self.clock += CALL
        if not self._active:
            self.outside.append(what)
