"""Sound while it is being made: what `Dia.stream` and `Dia.astream` do.

The delay pattern completes a frame 15 rows after it begins, and its samples depend on a few frames on either side of it
(`Codec.decode_context_frames`). So a chunk is decoded once so many frames beyond its end are complete, and the chunks
joined are what one decode of all frames gives. The codec keeps what the next chunk needs: no frame is computed twice.
Where two segments of a script meet, the last 10 ms of the first wait for the second, since they fade out only if more
follows.
"""

import asyncio
import math
import os
import threading
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from dia_fast.audio.audio import Audio, Samples
from dia_fast.engine import Engine, Handle
from dia_fast.errors import InputError, shown
from dia_fast.generation.inputs import Progress, progress_of
from dia_fast.generation.long_form import Script, warn_of
from dia_fast.generation.outcome import Outcome
from dia_fast.text.segmentation import FADE_SECONDS, fade_in
from dia_fast.utils.forks import OneProcess, renew_in_child
from dia_fast.utils.progress import StepBar
from dia_fast.utils.values import real_number

if TYPE_CHECKING:
    from dia_fast.audio.codec import Codec

FIRST_CHUNK_SECONDS = 0.1
AHEAD_SECONDS = 10.0  # how far an engine with a thread of its own goes on before the sound is taken
_AT_ONCE = 2  # segments of a stream: the one that is heard, and the next


def checked_seconds(name: str, value: Any) -> float:
    """Raise InputError unless it is a positive number."""
    seconds = real_number(name, value)
    if not 0 < seconds < math.inf:
        raise InputError(f"{name} must be a number above 0, such as 0.5, not {shown(value)}")
    return seconds


class Stream(OneProcess, Generator[Audio, None, None]):
    """The chunks of `Dia.stream`, and their outcome."""

    def __init__(self, script: Script, chunks: Generator[Audio, None, None]) -> None:
        self._script, self._chunks = script, chunks

    @property
    def outcome(self) -> Outcome | None:
        """The outcome of the text, None until the stream has ended."""
        return _outcome(self._script)

    def send(self, value: None) -> Audio:
        """Return the next chunk, as `next` does."""
        return self._chunks.send(value)

    def __next__(self) -> Audio:
        return next(self._chunks)

    def throw(self, *error: Any) -> Audio:
        """End the stream with an exception."""
        return self._chunks.throw(*error)

    def close(self) -> None:
        """End the request and free its memory."""
        self._chunks.close()


class AsyncStream(OneProcess, AsyncGenerator[Audio, None]):
    """The chunks of `Dia.astream`, and their outcome."""

    def __init__(self, made: list[Script], chunks: AsyncGenerator[Audio, None]) -> None:
        """made: will hold the script once its audio prompt is encoded."""
        self._made, self._chunks = made, chunks

    @property
    def outcome(self) -> Outcome | None:
        """The outcome of the text, None until the stream has ended."""
        return _outcome(self._made[0]) if self._made else None

    # Plain functions: a coroutine would put a frame of its own between the chunks and whoever waits for them.
    def __anext__(self) -> Any:
        return self._chunks.__anext__()

    def asend(self, value: None) -> Any:
        """Return the next chunk, as `anext` does."""
        return self._chunks.asend(value)

    def athrow(self, *error: Any) -> Any:
        """End the stream with an exception."""
        return self._chunks.athrow(*error)

    def aclose(self) -> Any:
        """End the request and free its memory."""
        return self._chunks.aclose()


def _outcome(script: Script) -> Outcome | None:
    return script.outcome if script.done and script.error is None else None


def stream(
    engine: Engine,
    codec: "Codec",
    script: Script,
    chunk_seconds: float,
    first_chunk_seconds: float = FIRST_CHUNK_SECONDS,
    progress: Progress = False,
) -> Generator[Audio, None, None]:
    """Speak a script chunk by chunk. However the generator ends, nothing of it is left in the engine."""
    count = len(script.segments)
    chunks, segments = Chunks(codec, chunk_seconds, first_chunk_seconds, count), Segments(engine, script)
    told = warn_of(script)
    try:
        with progress_of(progress, script.expected_steps(), script.frames_per_second) as report:
            start = engine.steps
            while segments.heard < count:
                segments.fill()
                while not segments.current.done:
                    while span := chunks.cut(segments.current):
                        yield from chunks.decode(span, script.seed)
                    before = engine.steps
                    engine.advance()
                    if report is not None and engine.steps > before:
                        report(engine.steps - start)
                if not segments.land():
                    continue
                if isinstance(report, StepBar) and count > 1:
                    report.segments(script.spoken, count, script.expected_steps())
                while span := chunks.cut(segments.current):
                    yield from chunks.decode(span, script.seed)
                yield from chunks.end_segment(script.seed)
                segments.heard += 1
        warn_of(script, told)
    except Exception as error:
        script.error = error
        raise
    finally:
        segments.withdraw()


async def astream(
    engine: Engine,
    codec: "Codec",
    script: Script,
    chunk_seconds: float,
    first_chunk_seconds: float = FIRST_CHUNK_SECONDS,
) -> AsyncGenerator[Audio, None]:
    """As `stream`, with everything that takes time or waits for a lock in threads of its own."""
    count, seed = len(script.segments), script.seed
    chunks, segments = Chunks(codec, chunk_seconds, first_chunk_seconds, count), Segments(engine, script)
    pump, told = _pumps.of(engine), warn_of(script)
    try:
        while segments.heard < count:
            await in_thread(segments.fill)
            while not segments.current.done:
                while span := chunks.cut(segments.current):
                    for chunk in await in_thread(chunks.decode, span, seed):
                        yield chunk
                await pump.wait(engine, segments.current, chunks.needed)
            if not segments.land():
                continue
            while span := chunks.cut(segments.current):
                for chunk in await in_thread(chunks.decode, span, seed):
                    yield chunk
            for chunk in chunks.end_segment(seed):
                yield chunk
            segments.heard += 1
        warn_of(script, told)
    except Exception as error:
        script.error = error
        raise
    finally:
        # Handed to a thread at once: a task of its own could be cancelled before it begins, when the loop ends.
        await asyncio.shield(in_thread(segments.withdraw))


class Segments:
    """The segments of one script in an engine: the one that is heard, and the next if it need not wait for this one.

    One thread may submit them while another withdraws them.
    """

    def __init__(self, engine: Engine, script: Script) -> None:
        self.engine, self.script, self.heard = engine, script, 0
        self._handles: dict[int, Handle] = {}  # of the last attempt at each
        self._running: list[int] = []
        self._withdrawn = False
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    @property
    def current(self) -> Handle:
        return self._handles[self.heard]

    def fill(self) -> None:
        """Submit the segments that can start."""
        while len(self._running) < _AT_ONCE and (ready := self.script.next_request()) is not None:
            index, request = ready
            handle = self.engine.submit(request, stream=True)
            with self._lock:
                self._handles[index] = handle
                self._running.append(index)
                withdrawn = self._withdrawn
            if withdrawn:
                handle.cancel()
                return

    def land(self) -> bool:
        """Take the segments that have ended; False if the one that is heard is to be tried again.

        Raises what ended one of them.
        """
        for index in [item for item in self._running if self._handles[item].done]:
            self._running.remove(index)
            self.script.take(index, self._handles[index].result())
        return self.script.frames[self.heard] is not None

    def withdraw(self) -> None:
        """Cancel whatever is on its way, and what is submitted from now on."""
        with self._lock:
            self._withdrawn = True
            handles = list(self._handles.values())
        for handle in handles:
            handle.cancel()


class Chunks:
    """Cuts the frames of each segment into spans, in order, decodes them, and joins the segments.

    seconds: length of a chunk; first: of the first one, if that is less; segments: how many there are.
    """

    def __init__(self, codec: "Codec", seconds: float, first: float = math.inf, segments: int = 1) -> None:
        self.codec, self.segments = codec, segments
        self.size, self._first = self._frames(seconds), self._frames(min(first, seconds))
        self._ahead = self._frames(AHEAD_SECONDS)
        self.sent = 0  # frames of this segment
        self._stream: Any = None  # of the codec, for this segment
        self._join = Joiner(round(FADE_SECONDS * codec.sample_rate)) if segments > 1 else None

    def _frames(self, seconds: float) -> int:
        # A day is as good as any longer time, and has a finite number of frames.
        return max(1, round(min(seconds, 86_400) * self.codec.sample_rate / self.codec.hop_length))

    @property
    def needed(self) -> int:
        """Frames that must be complete before the next span can be cut, unless the speech ends."""
        return self.sent + self._first + self.codec.decode_context_frames

    def cut(self, handle: Handle) -> tuple[Tensor, int, int] | None:
        """The next span, as all frames so far and its first and last but one; None if it is not there yet."""
        finished = handle.status == "done"
        if not finished and not handle.has(self.needed):
            handle.want(self.needed + self._ahead)
            return None
        frames, start = handle.ready(), self.sent
        self.sent = min(start + self._first, len(frames))
        if self.sent == start:
            return None
        self._first = self.size
        handle.want(self.needed + self._ahead)
        return frames, start, self.sent

    def decode(self, span: tuple[Tensor, int, int], seed: int | None) -> list[Audio]:
        """The sound that is certain now: one chunk, or none where it waits for what follows."""
        if self._stream is None:
            self._stream = self.codec.stream()
        samples = self._stream.decode_span(*span).numpy()
        return self._chunk(samples if self._join is None else self._join.add(samples), seed)

    def end_segment(self, seed: int | None) -> list[Audio]:
        """Return the sound that waited for the end of this segment, or of the script. The next one begins."""
        self.sent, self.segments, self._stream = 0, self.segments - 1, None
        if self._join is None:
            return []
        held = [self._join.end()]
        if self.segments == 0:
            held.append(self._join.close())
        return self._chunk(np.concatenate(held), seed)

    def _chunk(self, samples: Samples, seed: int | None) -> list[Audio]:
        return [Audio(samples, self.codec.sample_rate, seed)] if len(samples) else []


class Joiner:
    """`join_segments` for segments that arrive bit by bit: equal samples, each as early as it is certain.

    fade: samples of a fade. Of a segment, its last `fade` samples wait for its end, and then for the next segment.
    """

    def __init__(self, fade: int) -> None:
        self.fade = fade
        self._tail = np.zeros(0, np.float32)  # of the segments before: fades out if anything follows
        self._held = np.zeros(0, np.float32)  # of this segment
        self._length, self._first = 0, True

    def add(self, samples: Samples) -> Samples:
        """More of this segment; returns what is certain."""
        self._held = np.concatenate([self._held, samples])
        begins = self._length == 0
        if begins and len(self._held) < 2 * self.fade:  # shorter fades, if it ends now
            return np.zeros(0, np.float32)
        return self._send(len(self._held) - self.fade, self.fade if begins else 0)

    def end(self) -> Samples:
        """This segment is complete; returns what is certain."""
        total = self._length + len(self._held)
        count = min(self.fade, total // 2)
        sent = self._send(len(self._held) - count, count if self._length == 0 else 0) if total else self._held
        if total:
            self._tail, self._first = self._held, False
        self._held, self._length = np.zeros(0, np.float32), 0
        return sent

    def close(self) -> Samples:
        """No segment follows; returns the rest."""
        tail, self._tail = self._tail, np.zeros(0, np.float32)
        return tail

    def _send(self, count: int, fading: int) -> Samples:
        """The first `count` samples held, behind the end of the segment before; `fading`: of them, where it begins."""
        out, self._held = self._held[:count].copy(), self._held[count:]
        before = np.zeros(0, np.float32)
        if self._length == 0 and not self._first:
            before, self._tail = self._tail * fade_in(len(self._tail))[::-1], before
            out[:fading] *= fade_in(fading)
        self._length += count
        return np.concatenate([before, out])


_Result = TypeVar("_Result")


class _Threads:
    """For what takes time in an event loop. asyncio's own pool is left to the caller, who may fill it."""

    def __init__(self) -> None:
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self.pool = ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 2), "dia-fast-asyncio")


_threads = _Threads()


def in_thread(work: Callable[..., _Result], *inputs: Any) -> "asyncio.Future[_Result]":
    """Run something in a thread of ours; called in an event loop."""
    return asyncio.get_running_loop().run_in_executor(_threads.pool, work, *inputs)


class _Pump:
    """Makes an engine's steps in one thread for all streams of an event loop that wait."""

    def __init__(self) -> None:
        self._waiting: dict[Handle, int] = {}
        self._thread = ThreadPoolExecutor(1, "dia-fast-steps")
        self._steps: asyncio.Task[None] | None = None

    async def wait(self, engine: Engine, handle: Handle, frames: int) -> None:
        """Return when so many frames are complete, or nothing more will come."""
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
            await asyncio.get_running_loop().run_in_executor(self._thread, self._advance, engine)
        finally:
            self._steps = None

    def _advance(self, engine: Engine) -> None:
        """Go on until one of those that wait, the ones that have joined meanwhile included, has what it needs."""
        while (waiting := self._waiting.copy()) and not any(_is_there(*item) for item in waiting.items()):
            engine.advance()


def _is_there(handle: Handle, frames: int) -> bool:
    return handle.done or handle.has(frames)


class _Pumps:
    """The pumps of each engine and event loop. Loops end without a word and engines with their Dia: none is kept."""

    def __init__(self) -> None:
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self._pumps: WeakKeyDictionary[Engine, WeakKeyDictionary[AbstractEventLoop, _Pump]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, engine: Engine) -> _Pump:
        """The pump of an engine for the running event loop."""
        with self._lock:
            return self._pumps.setdefault(engine, WeakKeyDictionary()).setdefault(asyncio.get_running_loop(), _Pump())


_pumps = _Pumps()
