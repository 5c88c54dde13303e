"""Asynchronous copies of finish flags and new codes from the device to the host.

A report is one small tensor: for each running request whether it has finished, its step, where its speech ends, what
`sample` found wrong, and its last few codes. It is copied to the host in the order of the steps, and read once it is
there.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Listing
from typing import NamedTuple

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
        self._views: dict[int, tuple[Tensor, ...]] = {}
        self._sent: deque[tuple[Event, Listing[Sequence], Tensor]] = deque()
        self._count = 0

    def send(self, sequences: Listing[Sequence]) -> Event:
        """Report on the step launched last.

        Args:
            sequences: In the order of the batch, not to be changed afterwards.
        """
        assert len(self._sent) < _REPORTS
        step, index, expanded, codes, recent, report, *parts = self._prepared(len(sequences))
        torch.add(step, self._offsets, out=index)
        index.clamp_(min=0)
        torch.gather(codes, 1, expanded, out=recent)
        torch.cat(parts, 1, out=report)
        buffer = self._buffers[self._count % _REPORTS][: len(sequences)]
        self._count += 1
        self._device.to_host(report, buffer)
        event = self._device.event()
        self._sent.append((event, sequences, buffer))
        return event

    def arrived(self) -> Iterator[Report]:
        """The reports that are there, the oldest first. Waits for nothing."""
        while self._sent and self._sent[0][0].done():
            _, sequences, buffer = self._sent.popleft()
            yield Report(sequences, buffer.numpy(), self._channels)

    def forget(self) -> None:
        """Drop what is under way."""
        self._sent.clear()

    def _prepared(self, count: int) -> tuple[Tensor, ...]:
        """Views of all buffers for `count` requests, made once."""
        if count not in self._views:
            state, index, recent = self._state, self._index[:count], self._recent[:count]
            single = [tensor[:count, None] for tensor in (state.finished, state.step, state.eos_step)]
            expanded = index[:, :, None].expand(-1, -1, self._channels)
            parts = [*single, state.status[:count], recent.flatten(1)]
            views = (single[1], index, expanded, state.codes[:count], recent, self._report[:count], *parts)
            self._views[count] = views
        return self._views[count]
