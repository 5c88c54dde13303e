"""What a caller holds of a submitted request."""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dia_fast.ambient import isolated
from dia_fast.delay import undo_delay
from dia_fast.engine.request import Generation, Request
from dia_fast.errors import DiaFastError
from dia_fast.utils.forks import OneProcess, renew_in_child

if TYPE_CHECKING:
    from dia_fast.engine.scheduler import Engine

Status = Literal["waiting", "running", "done", "failed", "cancelled"]


class Cancelled(DiaFastError, RuntimeError):
    """The request was cancelled before it was done."""


class Handle(OneProcess):
    """A request on its way; made by `Engine.submit`. Safe to use from several threads.

    Whoever waits for a handle, by `result` or `frames`, makes the engine's steps meanwhile, for all requests.
    """

    def __init__(self, engine: "Engine", request: Request, first: int, streams: bool) -> None:
        self.request = request
        self.status: Status = "waiting"
        self.error: BaseException | None = None
        self._engine, self._first, self._streams = engine, first, streams
        self._generation: Generation | None = None
        self._rows: list[Tensor] = []
        self._received = 0
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self._joining = threading.Lock()

    @property
    def done(self) -> bool:
        """Whether nothing more will come: `status` is `"done"`, `"failed"` or `"cancelled"`."""
        return self.status not in ("waiting", "running")

    def cancel(self) -> None:
        """Ends the request and frees its memory, before the next step. Does nothing to one that is done."""
        self._engine.cancel(self)

    def result(self) -> Generation:
        """Waits for the end. Raises Cancelled, or the error that ended the request."""
        while not self.done:
            self._engine.advance()
        self._raise_if_lost()
        assert self._generation is not None
        return self._generation

    def frames(self) -> Iterator[Tensor]:
        """The frames as they become complete, `[n, channels]` int64 at a time; together they are `result().frames`.

        The first one is complete `max(delay) + 2` steps after the start. Needs `submit(..., stream=True)`. Raises as
        `result` does, after the last frame there is.
        """
        self._require_stream()
        sent = 0
        while True:
            finished = self.done
            ready = self.ready()
            if len(ready) > sent:
                yield ready[sent:]
                sent = len(ready)
            if finished:
                break
            self._engine.advance()
        self._raise_if_lost()

    @isolated()
    def ready(self) -> Tensor:
        """The frames that are complete so far, `[n, channels]` int64. Waits for nothing; needs `stream=True`."""
        if self._generation is not None:
            return self._generation.frames
        config = self._engine.model.config
        return undo_delay(self.rows(), config.delay_pattern, config.decoder.eos_token_id)[self._first :]

    @isolated()
    def rows(self) -> Tensor:
        """The delayed grid so far, from row 0 on, `[rows, channels]` int32. Waits for nothing; needs `stream=True`."""
        if self._generation is not None:
            return self._generation.rows
        self._require_stream()
        with self._joining:
            count = len(self._rows)
            if not count:
                return torch.empty(0, self._engine.model.config.decoder.num_channels, dtype=torch.int32, device="cpu")
            # In one go: a step of another thread may add to the list at any time.
            self._rows[:count] = [torch.cat(self._rows[:count])]
            return self._rows[0]

    def has(self, frames: int) -> bool:
        """Whether `ready` holds at least so many frames, told cheaply while it does not."""
        rows = self._first + 1 + frames + max(self._engine.model.config.delay_pattern)
        return (self._received >= rows or self.done) and len(self.ready()) >= frames

    def _receive(self, rows: Tensor) -> None:
        self._rows.append(rows)
        self._received += len(rows)

    def _require_stream(self) -> None:
        if not self._streams:
            raise ValueError("frames: this request does not stream; submit it with stream=True")

    def _raise_if_lost(self) -> None:
        if self.status == "cancelled":
            raise Cancelled("the request was cancelled")
        if self.error is not None:
            raise self.error

    def __repr__(self) -> str:
        return f"Handle({self.status}, {len(self.request.text_ids)} bytes of text)"
