"""One utterance on its way: from a checked request to the bytes of a response, never far ahead of its reader."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dia_fast.audio import Samples
from dia_fast.engine import Handle, Request
from dia_fast.errors import SilentSpeech
from dia_fast.reading import Reading
from dia_fast.script import FADE_SECONDS
from dia_fast.server.driver import Driver
from dia_fast.server.encoders import Format, Pipeline
from dia_fast.server.metrics import Metrics
from dia_fast.server.queueing import Gate

if TYPE_CHECKING:
    from dia_fast.codec import Codec


@dataclass(frozen=True)
class Plan:
    """A checked request.

    Args:
        reading: The text, its segments, voice and sampling.
        rate: Of the response, in Hz.
        chunks: Frames of the first chunk and of the later ones.
        seeded: Whether the request, or its voice, names the seed.
    """

    reading: Reading
    form: Format
    rate: int
    speed: float
    chunks: tuple[int, int]
    voice: str
    seeded: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.reading.seed


@dataclass(frozen=True)
class Workshop:
    """What all utterances share."""

    driver: Driver
    gate: Gate
    codec: "Codec"
    executor: Executor
    metrics: Metrics
    slow_seconds: float


class Speech:
    """Speaks a plan in a task of its own. Iterate over it for the bytes; `cancel` ends it before.

    At most `slow_seconds` of sound are made ahead of the reader. Then it waits, and its slot is free as soon as the
    segment under way has been generated.
    """

    def __init__(self, shop: Workshop, plan: Plan) -> None:
        self.shop, self.plan = shop, plan
        self.error: Exception | None = None
        self.spans: list[tuple[str, float, float]] = []
        """Of each segment: text, start and end in seconds of the response."""
        self.times = {"begin": time.monotonic()}
        self.tokens = 0
        self._pipeline = Pipeline(plan.form, shop.codec.sample_rate, plan.rate, plan.speed)
        self._seams = Seams(shop.codec.sample_rate, len(plan.reading.pieces))
        self._ready: deque[tuple[bytes, float]] = deque()
        self._held, self._native = 0.0, 0
        self._changed = asyncio.Event()
        self._waits = True
        shop.gate.waiting += 1
        self.task = asyncio.get_running_loop().create_task(self._produce())

    def __aiter__(self) -> "Speech":
        return self

    async def __anext__(self) -> bytes:
        """The next bytes. May be cancelled and called again. Raises what ended the speech."""
        while not self._ready:
            if self.task.done():
                if self.task.cancelled():
                    raise asyncio.CancelledError
                if self.error is not None:
                    raise self.error
                raise StopAsyncIteration
            await self._change()
        data, seconds = self._ready.popleft()
        self._held -= seconds
        self._notify()
        return data

    def cancel(self) -> None:
        """End it and free its slot."""
        self.task.cancel()

    @property
    def seconds(self) -> float:
        """Of sound, made so far."""
        return self._pipeline.seconds

    async def _produce(self) -> None:
        try:
            reading = self.plan.reading
            while (ready := reading.next_request()) is not None:
                await self._segment(*ready)
            if reading.outcome.status == "failed":
                raise SilentSpeech(reading.outcome.warnings[-1])
            await self._put(self._finish)
            self.shop.gate.ended()
            self._count()
        except Exception as error:
            self.error = error
        finally:
            self._leave_queue()
            self.task.add_done_callback(lambda _: self._notify())

    async def _segment(self, index: int, request: Request) -> None:
        release = await self.shop.gate.acquire(goes_on=not self._waits)
        self._leave_queue()
        self.times.setdefault("slot", time.monotonic())
        try:
            handle = await self.shop.driver.submit(request, release)
        except Exception:
            release()
            raise
        spans = _Spans(self.shop.codec, self.plan.chunks if not self._native else self.plan.chunks[1:] * 2)
        try:
            while True:
                await self.shop.driver.wait(handle, spans.needed)
                ended = handle.done
                while span := spans.cut(handle):
                    await self._put(self._decode, span)
                if ended:
                    break
            result = handle.result()
            self.tokens += len(result.frames)
            self.plan.reading.take(index, result)
            await self._put(self._end_segment, index)
        finally:
            if not handle.done:
                self.shop.driver.cancel(handle)

    def _leave_queue(self) -> None:
        if self._waits:
            self._waits = False
            self.shop.gate.waiting -= 1

    # In the executor, one at a time

    def _decode(self, span: tuple[Any, int, int]) -> bytes:
        samples = self.shop.codec.decode_span(*span).cpu().numpy()
        self._native += len(samples)
        return self._pipeline.write(self._seams.write(samples))

    def _end_segment(self, index: int) -> bytes:
        reading = self.plan.reading
        if reading.frames[index] is not None:  # not one that is tried again
            per_second = self.shop.codec.sample_rate * self.plan.speed
            start = self.spans[-1][2] if self.spans else 0.0
            self.spans.append((reading.pieces[index], start, self._native / per_second))
        self._seams.end()
        return b""

    def _finish(self) -> bytes:
        return self._pipeline.write(self._seams.close()) + self._pipeline.close()

    async def _put(self, work: Callable[..., bytes], *args: object) -> None:
        before = self.seconds
        data = await asyncio.get_running_loop().run_in_executor(self.shop.executor, work, *args)
        if data:
            self._ready.append((data, self.seconds - before))
            self._held += self.seconds - before
            self._notify()
        while self._held > self.shop.slow_seconds:
            await self._change()

    def _notify(self) -> None:
        self._changed.set()

    async def _change(self) -> None:
        self._changed = asyncio.Event() if self._changed.is_set() else self._changed
        await self._changed.wait()

    def _count(self) -> None:
        metrics = self.shop.metrics
        metrics.audio.inc(self.seconds)
        metrics.factor.observe(self.seconds / max(time.monotonic() - self.times["slot"], 1e-6))
        if self.plan.reading.outcome.finish_reason == "length":
            metrics.cut.inc()


class Seams:
    """Joins the sound of segments as it comes, as `join_pieces` does with all of it at once.

    Args:
        sample_rate: Hz.
        pieces: Number of segments; the sound of a single one stays as it is.
    """

    def __init__(self, sample_rate: int, pieces: int) -> None:
        self._count = round(FADE_SECONDS * sample_rate)
        self._single = pieces == 1
        self._fresh = self._first = True
        self._held, self._tail = np.zeros(0, np.float32), np.zeros(0, np.float32)
        self._size = 0

    def write(self, samples: Samples) -> Samples:
        """Take the next samples of the segment under way; returns those that are certain."""
        if self._single or not len(samples):
            return samples
        self._held = np.concatenate([self._held, samples])
        if len(self._held) < 2 * self._count:
            return samples[:0]
        out = self._begin(self._count)
        certain, self._held = self._held[: -self._count], self._held[-self._count :]
        return np.concatenate([out, certain])

    def end(self) -> None:
        """The segment is complete; its last samples wait for what follows."""
        if self._single or not len(self._held):
            return
        size = min(self._count, len(self._held) // 2) if self._fresh else self._count
        out = self._begin(size)
        self._tail, self._size = np.concatenate([out, self._held]), size
        self._held, self._fresh, self._first = np.zeros(0, np.float32), True, False

    def close(self) -> Samples:
        """The end of the last segment, which does not fade."""
        tail, self._tail = self._tail, np.zeros(0, np.float32)
        return tail

    def _begin(self, count: int) -> Samples:
        """At the beginning of a segment: fades it in, and the one before out, which is returned."""
        if not self._fresh:
            return np.zeros(0, np.float32)
        self._fresh = False
        tail, self._tail = self._tail, np.zeros(0, np.float32)
        if not self._first:
            if size := self._size:
                tail = tail.copy()
                tail[-size:] *= _ramp(size)[::-1]
            self._held[:count] *= _ramp(count)
        return tail


def _ramp(count: int) -> Samples:
    return (0.5 - 0.5 * np.cos(np.pi * np.arange(count) / max(count, 1))).astype(np.float32)


class _Spans:
    """Cuts the frames of one sequence into chunks: a short first one, so that sound begins early."""

    def __init__(self, codec: "Codec", sizes: tuple[int, ...]) -> None:
        self._context, self._sizes, self._sent = codec.decode_context_frames, sizes, 0

    @property
    def _size(self) -> int:
        return self._sizes[1] if self._sent else self._sizes[0]

    @property
    def needed(self) -> int:
        """Frames that must be complete before the next chunk can be decoded, unless the speech ends."""
        return self._sent + self._size + self._context

    def cut(self, handle: Handle) -> tuple[Any, int, int] | None:
        """All frames so far, and the first and last but one of the next chunk; None if it is not there yet."""
        if handle.status != "done" and not handle.has(self.needed):
            return None
        frames, start = handle.ready(), self._sent
        end = min(start + self._size, len(frames))
        self._sent = end
        return (frames, start, end) if end > start else None
