"""What the host learns of the device's progress, without making either wait for the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast.engine.run import Run
from dia_fast.state import DecodeState

POLL_EVERY = 8  # steps between two looks at a GPU; at a CPU every step is looked at


@dataclass(frozen=True)
class Seen:
    """One request as it was after some step: whether it had finished, and if not, the rows new to its stream.

    status: `[channels]` int32 on the host if some channel reports what `sample` found wrong, otherwise None.
    """

    run: Run
    finished: bool
    rows: Tensor | None
    status: Tensor | None


class Watch:
    """Sends copies of finished flags, status words and streamed rows on their way and picks them up later."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.steps = 0
        self._sent: tuple[list[Run], Tensor, Tensor, list[Tensor | None]] | None = None
        self._arrived: torch.cuda.Event | None = None

    def after_step(self, state: DecodeState, runs: Sequence[Run]) -> list[Seen]:
        """Call it after each step with the requests in the order of their slots; returns what has arrived."""
        self.steps += 1
        if self._sent is None and (not self.on_gpu or self.steps % POLL_EVERY == 0):
            self._send(state, runs)
        if self._sent is None or (self._arrived is not None and not self._arrived.query()):
            return []
        runs, finished, status, rows = self._sent
        self._sent = self._arrived = None
        seen = zip(runs, finished.tolist(), status, status.any(1).tolist(), rows, strict=True)
        return [
            Seen(run, bool(flag), None if flag else new, word if wrong else None)
            for run, flag, word, wrong, new in seen
        ]

    def forget(self) -> None:
        """Drops what is under way."""
        self._sent = self._arrived = None

    def _send(self, state: DecodeState, runs: Sequence[Run]) -> None:
        finished = self._copy(state.finished[: len(runs)])
        status = self._copy(state.status[: len(runs)])
        rows: list[Tensor | None] = []
        for slot, run in enumerate(runs):
            new = None
            if run.streams:
                new = self._copy(state.codes[slot, run.received : run.row])
                run.received = run.row
            rows.append(new)
        self._sent = list(runs), finished, status, rows
        if self.on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def _copy(self, tensor: Tensor) -> Tensor:
        if not self.on_gpu:
            return tensor.clone()
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
        return there.copy_(tensor, non_blocking=True)
