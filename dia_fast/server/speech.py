"""One utterance on its way: from a checked request to the bytes of a response, never far ahead of its reader."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dia_fast.audio.audio import Audio
from dia_fast.engine import Request
from dia_fast.errors import SilentSpeech
from dia_fast.generation.long_form import Script
from dia_fast.generation.streaming import Chunks
from dia_fast.server.driver import Driver
from dia_fast.server.encoders import Format, Pipeline
from dia_fast.server.metrics import Metrics
from dia_fast.server.queueing import Gate

if TYPE_CHECKING:
    from dia_fast.audio.codec import Codec


@dataclass(frozen=True)
class Plan:
    """A checked request.

    Args:
        script: The text, its segments, voice and sampling.
        rate: Of the response, in Hz.
        chunks: Seconds of the first chunk and of the later ones.
        seeded: Whether the request, or its voice, names the seed.
    """

    script: Script
    form: Format
    rate: int
    speed: float
    chunks: tuple[float, float]
    voice: str
    seeded: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.script.seed


@dataclass(frozen=True)
class Workshop:
    """State that all utterances share."""

    driver: Driver
    gate: Gate
    codec: "Codec"
    executor: Executor
    metrics: Metrics
    slow_seconds: float


class Speech:
    """Speaks a plan in a task of its own. Iterate over it for the bytes; `cancel` ends it before.

    At most `slow_seconds` of sound are made ahead of the reader. Then it waits, and its turn ends as soon as the
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
        first, later = plan.chunks
        self._chunks = Chunks(shop.codec, later, first, len(plan.script.segments))
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
        """End it and its turn."""
        self.task.cancel()

    @property
    def seconds(self) -> float:
        """Of sound, made so far."""
        return self._pipeline.seconds

    async def _produce(self) -> None:
        try:
            script = self.plan.script
            while (ready := script.next_request()) is not None:
                await self._segment(*ready)
            if script.outcome.status == "failed":
                raise SilentSpeech(script.outcome.warnings[-1])
            await self._put(self._pipeline.close)
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
        self.times.setdefault("running", time.monotonic())
        try:
            handle = await self.shop.driver.submit(request, release)
        except Exception:
            release()
            raise
        try:
            while True:
                await self.shop.driver.wait(handle, self._chunks.needed)
                ended = handle.done
                while span := self._chunks.cut(handle):
                    await self._put(self._decode, span)
                if ended:
                    break
            result = handle.result()
            self.tokens += len(result.frames)
            self.plan.script.take(index, result)
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
        self._native += (span[2] - span[1]) * self.shop.codec.hop_length
        return self._write(self._chunks.decode(span, None))

    def _end_segment(self, index: int) -> bytes:
        script = self.plan.script
        if script.frames[index] is None:  # it is tried again
            return b""
        per_second = self.shop.codec.sample_rate * self.plan.speed
        start = self.spans[-1][2] if self.spans else 0.0
        self.spans.append((script.segments[index], start, self._native / per_second))
        return self._write(self._chunks.end_segment(None))

    def _write(self, chunks: list[Audio]) -> bytes:
        return b"".join(self._pipeline.write(chunk.samples) for chunk in chunks)

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
        metrics.factor.observe(self.seconds / max(time.monotonic() - self.times["running"], 1e-6))
        if self.plan.script.outcome.finish_reason == "length":
            metrics.cut.inc()
