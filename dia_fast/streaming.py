"""Sound while it is being made: what `Dia.stream` and `Dia.astream` do.

The delay pattern completes a frame 15 rows after it begins, and its samples depend on a few frames on either side of it
(`Codec.decode_context_frames`). So a chunk is decoded once so many frames beyond its end are complete, together with
just so many on either side, and the chunks joined are what one decode of all frames gives.
"""

import asyncio
import math
import threading
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from dia_fast.arguments import Progress, cut_remark, expected_of, progress_of
from dia_fast.audio import Audio
from dia_fast.config import DiaConfig
from dia_fast.engine import Engine, Generation, Handle, Request
from dia_fast.errors import InputError, shown
from dia_fast.outcome import Outcome, Segment, attempt_seed, finish_reason, silence
from dia_fast.settings import SamplingSettings
from dia_fast.text import TextWarning, checked_text
from dia_fast.values import real_number
from dia_fast.warn import warn

if TYPE_CHECKING:
    from dia_fast.codec import Codec


def checked_seconds(chunk_seconds: Any) -> float:
    """Raises InputError unless it is a positive number."""
    seconds = real_number("chunk_seconds", chunk_seconds)
    if not 0 < seconds < math.inf:
        raise InputError(f"chunk_seconds must be a number above 0, such as 0.5, not {shown(chunk_seconds)}")
    return seconds


class Attempts:
    """The attempts to speak the text of one stream. Silence is known before anything was sent, so it can start anew."""

    def __init__(
        self, config: DiaConfig, text: str | bytes, settings: SamplingSettings, request: Request | None = None
    ) -> None:
        self.config, self.text, self.settings, self.request = config, checked_text(text), settings, request
        self.seeds: tuple[int, ...] = ()
        self.outcome: Outcome | None = None

    def next_request(self) -> Request:
        assert self.request is not None and self.request.seed is not None
        seed = attempt_seed(self.request.seed, len(self.seeds))
        self.seeds += (seed,)
        return replace(self.request, seed=seed)

    def take(self, result: Generation) -> bool:
        """Whether this was the last attempt; `outcome` is there then."""
        assert self.request is not None
        reason = finish_reason(len(result.frames), result.truncated)
        if reason == "silent" and len(self.seeds) <= self.settings.retries and not self.settings.greedy:
            return False
        given = 0 if self.request.prompt is None else len(self.request.prompt)
        remarks = {
            "silent": silence(len(self.seeds)),
            "length": cut_remark(self.config, self.request.max_new_tokens, given),
        }
        told = (remarks[reason],) if reason in remarks else ()
        self.outcome = Outcome((Segment(self.text, reason, len(result.frames), self.seeds),), told)
        return True

    def warn(self) -> None:
        assert self.outcome is not None
        for remark in self.outcome.warnings:
            warn(remark, TextWarning)


class Stream(Generator[Audio, None, None]):
    """The chunks of `Dia.stream`, and their outcome."""

    def __init__(self, attempts: Attempts, chunks: Generator[Audio, None, None]) -> None:
        self._attempts, self._chunks = attempts, chunks

    @property
    def outcome(self) -> Outcome | None:
        """What became of the text: None until the stream has ended."""
        return self._attempts.outcome

    def send(self, value: None) -> Audio:
        return self._chunks.send(value)

    def __next__(self) -> Audio:
        return next(self._chunks)

    def throw(self, *error: Any) -> Audio:
        return self._chunks.throw(*error)

    def close(self) -> None:
        self._chunks.close()


class AsyncStream(AsyncGenerator[Audio, None]):
    """The chunks of `Dia.astream`, and their outcome."""

    def __init__(self, attempts: Attempts, chunks: AsyncGenerator[Audio, None]) -> None:
        self._attempts, self._chunks = attempts, chunks

    @property
    def outcome(self) -> Outcome | None:
        """What became of the text: None until the stream has ended."""
        return self._attempts.outcome

    # Plain functions: a coroutine would put a frame of its own between the chunks and whoever waits for them.
    def __anext__(self) -> Any:
        return self._chunks.__anext__()

    def asend(self, value: None) -> Any:
        return self._chunks.asend(value)

    def athrow(self, *error: Any) -> Any:
        return self._chunks.athrow(*error)

    def aclose(self) -> Any:
        return self._chunks.aclose()


def stream(
    engine: Engine, codec: "Codec", attempts: "Attempts", chunk_seconds: float, progress: Progress
) -> Generator[Audio, None, None]:
    """Speaks a request chunk by chunk. However the generator ends, nothing of the request is left in the engine."""
    chunks = _Chunks(codec, chunk_seconds)
    request, rate = attempts.next_request(), codec.frames_per_second
    handle = engine.submit(request, stream=True)
    try:
        with progress_of(progress, expected_of(engine.model.config, [request], rate), rate) as report:
            start = engine.steps
            while True:
                while not handle.done:
                    while span := chunks.cut(handle):
                        yield chunks.decode(span, request.seed)
                    before = engine.steps
                    engine.advance()
                    if report is not None and engine.steps > before:
                        report(engine.steps - start)
                result = handle.result()
                if attempts.take(result):
                    break
                handle = engine.submit(attempts.next_request(), stream=True)
        while span := chunks.cut(handle):
            yield chunks.decode(span, request.seed)
        attempts.warn()
    finally:
        handle.cancel()


async def astream(
    engine: Engine, codec: "Codec", attempts: "Attempts", chunk_seconds: float
) -> AsyncGenerator[Audio, None]:
    """As `stream`, with everything that takes time or waits for a lock in threads of asyncio's pool."""
    chunks, pump, submission = _Chunks(codec, chunk_seconds), _pump(engine), _Submission()
    try:
        seed = None
        while True:
            request = attempts.next_request()
            seed = request.seed if seed is None else seed
            handle = await asyncio.to_thread(submission.submit, engine, request)
            while not handle.done:
                while span := chunks.cut(handle):
                    yield await asyncio.to_thread(chunks.decode, span, seed)
                await pump.wait(engine, handle, chunks.needed)
            if attempts.take(handle.result()):
                break
        while span := chunks.cut(handle):
            yield await asyncio.to_thread(chunks.decode, span, seed)
        attempts.warn()
    finally:
        # Handed to a thread at once: a task of its own could be cancelled before it begins, when the loop ends.
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, submission.withdraw))


class _Chunks:
    """Cuts the frames of one stream into spans, in order, and decodes them."""

    def __init__(self, codec: "Codec", seconds: float) -> None:
        self.codec = codec
        # A day is as good as any longer time, and has a finite number of frames.
        self.size = max(1, round(min(seconds, 86_400) * codec.sample_rate / codec.hop_length))
        self.sent = 0

    @property
    def needed(self) -> int:
        """Frames that must be complete before the next span can be cut, unless the speech ends."""
        return self.sent + self.size + self.codec.decode_context_frames

    def cut(self, handle: Handle) -> tuple[Tensor, int, int] | None:
        """The next span, as all frames so far and its first and last but one; None if it is not there yet."""
        finished = handle.status == "done"
        if not finished and not handle.has(self.needed):
            return None
        frames, start = handle.ready(), self.sent
        self.sent = min(start + self.size, len(frames))
        return (frames, start, self.sent) if self.sent > start else None

    def decode(self, span: tuple[Tensor, int, int], seed: int | None) -> Audio:
        return Audio(self.codec.decode_span(*span).cpu().numpy(), self.codec.sample_rate, seed)


class _Submission:
    """A request that one thread submits, and another may withdraw before, meanwhile or after."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle: Handle | None = None
        self._withdrawn = False

    def submit(self, engine: Engine, request: Request) -> Handle:
        handle = engine.submit(request, stream=True)
        with self._lock:
            self._handle = handle
            withdrawn = self._withdrawn
        if withdrawn:
            handle.cancel()
        return handle

    def withdraw(self) -> None:
        with self._lock:
            self._withdrawn = True
            handle = self._handle
        if handle is not None:
            handle.cancel()


class _Pump:
    """Makes an engine's steps in one thread for all streams of an event loop that wait."""

    def __init__(self) -> None:
        self._waiting: dict[Handle, int] = {}
        self._steps: asyncio.Task[None] | None = None

    async def wait(self, engine: Engine, handle: Handle, frames: int) -> None:
        """Returns when so many frames are complete, or nothing more will come."""
        self._waiting[handle] = frames
        try:
            while not _is_there(handle, frames):
                if self._steps is None:
                    self._steps = asyncio.create_task(self._make_steps(engine))
                await asyncio.shield(self._steps)  # the others still wait if this one is cancelled
        finally:
            del self._waiting[handle]

    async def _make_steps(self, engine: Engine) -> None:
        try:
            await asyncio.to_thread(self._advance, engine)
        finally:
            self._steps = None

    def _advance(self, engine: Engine) -> None:
        """Goes on until one of those that wait, the ones that have joined meanwhile included, has what it needs."""
        while (waiting := self._waiting.copy()) and not any(_is_there(*item) for item in waiting.items()):
            engine.advance()


def _is_there(handle: Handle, frames: int) -> bool:
    return handle.done or handle.has(frames)


# Event loops end without a word and engines with their Dia, so neither is kept alive here.
_pumps: WeakKeyDictionary[Engine, WeakKeyDictionary[AbstractEventLoop, _Pump]] = WeakKeyDictionary()
_pumps_lock = threading.Lock()


def _pump(engine: Engine) -> _Pump:
    """The pump of an engine for the running event loop."""
    with _pumps_lock:
        return _pumps.setdefault(engine, WeakKeyDictionary()).setdefault(asyncio.get_running_loop(), _Pump())
