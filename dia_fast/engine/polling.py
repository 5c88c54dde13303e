"""Asynchronous copies of finish flags and new codes from the device to the host.

A report is one small tensor: for each running request whether it has finished, its step, where its speech ends, what
`sample` found wrong, and its last few codes. It is copied to the host in the order of the steps, and read once it is
there.
"""

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dia_fast.engine.device import Device, Event
from dia_fast.engine.sequence import Sequence
from dia_fast.model.decode_state import DecodeState

RECENT = 4  # steps of codes in a report: at least the steps between two of them
_REPORTS = 4  # under way at once, at most
_FINISHED, _ROW, _EOS_ROW, _STATUS = range(4)


class Report(NamedTuple):
    """The sequences of a step, in the order of the batch, and their part of the report, `[sequences, width]`."""

    sequences: Listing[Sequence]
    values: NDArray[np.int32]
    channels: int

    @property
    def finished(self) -> NDArray[np.int32]:
        return self.values[:, _FINISHED]

    @property
    def step(self) -> NDArray[np.int32]:
        return self.values[:, _ROW]

    @property
    def eos_step(self) -> NDArray[np.int32]:
        return self.values[:, _EOS_ROW]

    @property
    def status(self) -> NDArray[np.int32]:
        """`[sequences, channels]`, see `dia_kernels.reference.sample`."""
        return self.values[:, _STATUS : _STATUS + self.channels]

    @property
    def recent(self) -> NDArray[np.int32]:
        """`[sequences, RECENT, channels]`: the codes of the last steps of each."""
        return self.values[:, _STATUS + self.channels :].reshape(len(self.values), RECENT, self.channels)

    @property
    def latest(self) -> NDArray[np.int32]:
        """`[sequences, channels]`: the codes of the last step of each."""
        return self.values[:, -self.channels :]


_Place: TypeAlias = tuple[Callable[[], None], Tensor, list[tuple[Tensor, NDArray[np.int32]]]]
"""A function that fills the report for so many requests, the report, and the buffers that it is copied to."""


class Polling:
    """Sends reports on their way and reads those that have arrived."""

    def __init__(self, state: DecodeState, device: Device) -> None:
        self._state, self._device = state, device
        self._channels = state.delay.shape[0]
        width = _STATUS + (1 + RECENT) * self._channels
        self._offsets = torch.arange(-RECENT, 0, dtype=torch.int64, device=device.torch)
        self._index = torch.zeros(state.batch, RECENT, dtype=torch.int64, device=device.torch)
        self._recent = torch.zeros(state.batch, RECENT, self._channels, dtype=torch.int32, device=device.torch)
        self._report = torch.zeros(state.batch, width, dtype=torch.int32, device=device.torch)
        self._buffers = [device.staging(state.batch, width) for _ in range(_REPORTS)]
        self._places: dict[int, _Place] = {}
        self._sent: deque[tuple[Event, Listing[Sequence], NDArray[np.int32]]] = deque()
        self._count = 0

    def send(self, sequences: Listing[Sequence]) -> Event:
        """Report on the step launched last.

        Args:
            sequences: In the order of the batch, not to be changed afterwards.
        """
        assert len(self._sent) < _REPORTS
        place = self._places.get(len(sequences))
        if place is None:
            place = self._places[len(sequences)] = self._place(len(sequences))
        collect, report, buffers = place
        collect()
        buffer, values = buffers[self._count % _REPORTS]
        self._count += 1
        self._device.to_host(report, buffer)
        event = self._device.event()
        self._sent.append((event, sequences, values))
        return event

    def arrived(self) -> Iterator[Report]:
        """The reports that are there, the oldest first. Waits for nothing."""
        while self._sent and self._sent[0][0].done():
            _, sequences, values = self._sent.popleft()
            yield Report(sequences, values, self._channels)

    def forget(self) -> None:
        """Drop what is under way."""
        self._sent.clear()

    def _place(self, count: int) -> _Place:
        """All views for `count` requests, which are made once."""
        report = self._report[:count]
        on_host = self._state.codes.device.type == "cpu"
        collect = self._collect_on_host(count, report.numpy()) if on_host else self._collect(count, report)
        return collect, report, [(buffer[:count], buffer[:count].numpy()) for buffer in self._buffers]

    def _collect(self, count: int, report: Tensor) -> Callable[[], None]:
        state = self._state
        index, recent = self._index[:count], self._recent[:count]
        single = [tensor[:count, None] for tensor in (state.finished, state.step, state.eos_step)]
        expanded = index[:, :, None].expand(-1, -1, self._channels)
        parts = [*single, state.status[:count], recent.flatten(1)]

        def collect() -> None:
            torch.add(single[1], self._offsets, out=index)
            index.clamp_(min=0)
            torch.gather(state.codes[:count], 1, expanded, out=recent)
            torch.cat(parts, 1, out=report)

        return collect

    def _collect_on_host(self, count: int, report: NDArray[np.int32]) -> Callable[[], None]:
        """The same by numpy, whose calls on so little data take a fraction of the time of torch's."""
        state = self._state
        finished, step, eos_step, status = (
            tensor[:count].numpy() for tensor in (state.finished, state.step, state.eos_step, state.status)
        )
        codes = state.codes[:count].flatten(0, 1).numpy()
        first = (np.arange(count, dtype=np.int32) * state.codes.shape[1])[:, None]
        offsets, index = first + np.arange(-RECENT, 0, dtype=np.int32), np.zeros((count, RECENT), np.int32)
        behind = _STATUS + self._channels
        of_status, recent = report[:, _STATUS:behind], report[:, behind:].reshape(count, RECENT, self._channels)

        def collect() -> None:
            report[:, _FINISHED], report[:, _ROW], report[:, _EOS_ROW] = finished, step, eos_step
            of_status[...] = status
            np.add(step[:, None], offsets, out=index)
            np.maximum(index, first, out=index)
            recent[...] = codes.take(index, 0)

        return collect
