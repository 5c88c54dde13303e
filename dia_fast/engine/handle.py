"""The caller's end of a submitted request."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dia_fast.engine.request import Generation
from dia_fast.engine.sequence import Sequence, Status
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import undo_delay
from dia_fast.utils.ambient import isolated
from dia_fast.utils.forks import OneProcess


class Cancelled(DiaFastError, RuntimeError):
    """The request was cancelled before it was done."""


class Handle(OneProcess):
    """A request on its way; made by `Engine.submit`. Safe to use from several threads.

    Whoever waits for a handle, by `result` or `frames`, makes the engine's steps meanwhile, for all requests, unless
    the engine has a thread of its own.

    Args:
        sequence: The request as the engine keeps it.
        config: Of the model.
        advance: Makes a step of the engine, or waits for one for at most so many seconds.
        cancel: Ends the request.
        wake: Wakes the engine's thread.
    """

    def __init__(
        self,
        sequence: Sequence,
        config: DiaConfig,
        advance: Callable[[float | None], None],
        cancel: Callable[[Sequence], None],
        wake: Callable[[], None],
    ) -> None:
        self.request = sequence.plan.request
        self._sequence, self._config = sequence, config
        self._advance, self._cancel, self._wake = advance, cancel, wake

    @property
    def number(self) -> int:
        """Of the request in its engine, in the order of submission."""
        return self._sequence.number

    @property
    def status(self) -> Status:
        """The state of the request: waiting, running, done, failed or cancelled."""
        return self._sequence.status

    @property
    def error(self) -> BaseException | None:
        """The exception that ended the request, or None."""
        return self._sequence.error

    @property
    def done(self) -> bool:
        """True when nothing more will come: `status` is `"done"`, `"failed"` or `"cancelled"`."""
        return self._sequence.done

    def cancel(self) -> None:
        """End the request and free its memory: at once, or when the step that another thread makes has ended.

        Does nothing to one that is done, and waits for nothing.
        """
        self._cancel(self._sequence)

    def want(self, frames: int | None) -> None:
        """Say how many frames may be there ahead of need.

        The engine's own thread, if it has one, rests while every request has as many as are wanted, so that speech
        that nobody may listen to is not made. Somebody who waits for steps gets them anyway.

        Args:
            frames: From the beginning; None for all, as at first.
        """
        self._sequence.wanted = math.inf if frames is None else frames
        self._wake()

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end.

        Args:
            timeout: Most seconds to wait; the request goes on afterwards. A step that has begun is not broken off.

        Raises:
            TimeoutError: If it is not done by then.
            Cancelled: If the request was cancelled. Other errors are what ended it.
        """
        end = None if timeout is None else time.monotonic() + timeout
        self.want(None)
        while not self.done:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"the request is not done after {timeout} s; it goes on: {self}")
            self._advance(left)
        self._raise_if_lost()
        assert self._sequence.generation is not None
        return self._sequence.generation

    def frames(self) -> Iterator[Tensor]:
        """The frames as they become complete, `[n, channels]` int64 at a time; together they are `result().frames`.

        The first one is complete `max(delay) + 2` steps after the start. Raises as `result` does, after the last frame
        there is.
        """
        sent = 0
        while True:
            finished = self.done
            ready = self.ready()
            if len(ready) > sent:
                yield ready[sent:]
                sent = len(ready)
            if finished:
                break
            self._advance(None)
        self._raise_if_lost()

    @isolated()
    def ready(self) -> Tensor:
        """The frames that are complete so far, `[n, channels]` int64. Waits for nothing."""
        generation = self._sequence.generation
        if generation is not None:
            return generation.frames
        config = self._config
        frames = undo_delay(self.delayed_codes(), config.delay_pattern, config.decoder.eos_token_id)
        return frames[self._sequence.plan.first :]

    @isolated()
    def delayed_codes(self) -> Tensor:
        """The delayed codes so far, from step 0 on: `[steps, channels]` int32. Waits for nothing."""
        sequence = self._sequence
        if sequence.generation is not None:
            return sequence.generation.delayed_codes
        count = sequence.received  # before the codes: a step of another thread may add to them at any time
        if sequence.codes is None:
            return torch.empty(0, self._config.decoder.num_channels, dtype=torch.int32, device="cpu")
        return torch.from_numpy(sequence.codes[:count].copy())

    def has(self, frames: int) -> bool:
        """Tell cheaply if `ready` holds enough frames.

        Args:
            frames: That must be there, from the beginning.
        """
        steps = self._sequence.plan.first + 1 + frames + max(self._config.delay_pattern)
        return (self._sequence.received >= steps or self.done) and len(self.ready()) >= frames

    def _raise_if_lost(self) -> None:
        if self.status == "cancelled":
            raise Cancelled("the request was cancelled")
        if self.error is not None:
            raise self.error

    def __repr__(self) -> str:
        return f"Handle({self.status}, {len(self.request.text_ids)} bytes of text)"
