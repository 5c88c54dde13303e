"""Sound of many streams, made in a thread and on a CUDA stream of their own, never by the thread that makes steps.

Whoever wants the samples of a span hands in its new codes and waits. The thread takes whatever has been handed in by
then, and decodes pieces of the same length as one batch. A piece is as long as it is asked for: its shape repeats with
each chunk, and so does its CUDA graph.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from dia_fast.audio.codec.incremental import OPEN, IncrementalDecoder
from dia_fast.errors import InputError, NumericError
from dia_fast.utils.ambient import exact_convolutions, isolated
from dia_fast.utils.forks import OneProcess, renew_in_child

if TYPE_CHECKING:
    from dia_fast.audio.codec.codec import Codec

SPAN = 64  # most frames of a piece
_BATCH = 256  # most frames of all pieces of a batch, unless there is one alone: both bound the memory
_STREAMS = 32  # to begin with
_GRAPHS = 16  # at most; other shapes run launch by launch

Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(eq=False)
class _Job:
    """New codes of one stream, `[n, codebooks]` int64 on the CPU. samples: the pieces so far."""

    stream: "CodecStream"
    codes: Tensor
    end: int
    future: "Future[Tensor]" = field(default_factory=Future)
    samples: list[Tensor] = field(default_factory=list)


class CodecStream(OneProcess):
    """Decodes the spans of one sound, in their order, each frame once. Made by `Codec.stream`."""

    def __init__(self, stage: "Stage", codec: "Codec", row: int) -> None:
        self._stage, self._codec, self._row = stage, codec, row
        self._fed, self._end = 0, OPEN
        self._sent = 0  # frames
        self._held = torch.zeros(0, dtype=torch.float32, device="cpu")  # samples that are made and not sent yet
        self._error: BaseException | None = None

    @isolated()
    def decode_span(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """The samples of frames start..stop-1 as in `Codec.decode(codes)`, on the CPU.

        Args:
            codes: All frames so far, `[frames, codebooks]` integers: `decode_context_frames` beyond `stop`, or all
                there will be.
            start: Where the last span ended.
            stop: The end of this one.

        Raises:
            InputError: For another span or codes that cannot be decoded.
            NumericError: Where the sound is NaN or infinity.
        """
        codec = self._codec
        codec.check_codes(codes)
        if start != self._sent or not start <= stop <= len(codes) or self._end not in (OPEN, len(codes)):
            raise InputError(
                f"frames {start} to {stop} of {len(codes)} are not the next span of this stream, which has sent "
                f"{self._sent}"
            )
        if self._error is not None:
            raise self._error
        config = codec.config
        wanted = config.samples_of(stop) if stop == len(codes) else stop * config.hop_length
        wanted -= start * config.hop_length
        upto = stop + config.decode_context_frames
        if upto > len(codes):
            self._end = len(codes)
        if len(self._held) < wanted and upto > self._fed:
            job = _Job(self, self._new(codes, upto, wanted), self._end)
            self._stage.put(job)
            try:
                self._held = torch.cat([self._held, job.future.result()])
            except BaseException as error:
                self._error = error if isinstance(error, Exception) else InputError("this stream was interrupted")
                raise
        samples, self._held, self._sent = self._held[:wanted], self._held[wanted:], stop
        return samples

    def _new(self, codes: Tensor, upto: int, wanted: int) -> Tensor:
        """Codes up to a frame; behind the end of the stream as many more as complete its samples."""
        new = codes[self._fed : min(upto, len(codes))].to("cpu", torch.int64)
        if self._end == OPEN:
            return new
        decoder, hop = self._stage.shape, self._codec.hop_length
        total = self._sent * hop + wanted
        count = len(new)
        while decoder.first_sample(self._fed + count) < total:
            count += 1
        return functional.pad(new, (0, 0, 0, count - len(new)))


class Stage(OneProcess):
    """The decoder of a codec for many streams, and its thread.

    Args:
        codec: With a `DacNetwork`.
        capture: Makes a graph of a step; None for none.

    Attributes:
        computed: Frames computed so far, all streams together.
        batches: Steps made so far.
    """

    def __init__(self, codec: "Codec", capture: Capture | None = None) -> None:
        self._codec = weakref.ref(codec)
        self.capture = capture
        self.shape = IncrementalDecoder(codec.network, codec.config, 0)
        self._decoder: IncrementalDecoder | None = None
        self.computed = self.batches = 0
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._seen: set[tuple[int, int]] = set()
        self._free: list[int] = []
        self._rows = 0
        self._cuda: torch.cuda.Stream | None = None
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        self._lock, self._jobs = threading.Lock(), SimpleQueue[_Job | None]()
        self._thread: threading.Thread | None = None

    @property
    def codec(self) -> "Codec":
        codec = self._codec()
        assert codec is not None
        return codec

    def open(self) -> CodecStream:
        """Begin a stream. What is kept of it is free once nobody holds it."""
        with self._lock:
            if self._free:
                row = self._free.pop()
            else:
                row, self._rows = self._rows, self._rows + 1
        stream = CodecStream(self, self.codec, row)
        weakref.finalize(stream, self._free.append, row).atexit = False
        return stream

    def put(self, job: _Job) -> None:
        """Hand a job to the thread, which is started if there is none."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # an interruption kept it from its beginning
                inputs = (weakref.ref(self), self._jobs)
                self._thread = threading.Thread(target=_work, args=inputs, name="dia-fast-codec", daemon=True)
                weakref.finalize(self, _end, self._thread, self._jobs)
                self._thread.start()
        self._jobs.put(job)

    # In the thread

    @isolated()
    @exact_convolutions()
    def run(self, jobs: list[_Job]) -> None:
        """Decode all jobs, in batches of equal lengths; each has its result or its error afterwards."""
        with self._active():
            todo = [job for job in jobs if self._begin(job)]
            while todo:
                size = min(len(todo[0].codes), SPAN)
                batch = [job for job in todo if min(len(job.codes), SPAN) == size][: self._most(size)]
                try:
                    self._step(batch, size)
                except Exception as error:
                    for job in batch:
                        job.future.set_exception(error)
                        job.codes = job.codes[:0]
                todo = [job for job in todo if len(job.codes)]

    def _begin(self, job: _Job) -> bool:
        if not job.future.set_running_or_notify_cancel():
            return False
        decoder, row = self._decoder, job.stream._row
        if decoder is None:
            decoder = IncrementalDecoder(self.shape.network, self.shape.config, max(_STREAMS, row + 1))
        elif row >= decoder.streams:
            decoder = decoder.grown(2 * row)
            self._graphs.clear()
        self._decoder = decoder
        if job.stream._fed == 0:
            decoder.clear(row)
        return True

    def _most(self, size: int) -> int:
        """Streams in a batch. On a CPU each is decoded by itself: its bits do not depend on the others then."""
        return max(1, _BATCH // size) if self.shape.device.type != "cpu" or self.capture is not None else 1

    def _step(self, batch: list[_Job], size: int) -> None:
        """The next `size` frames of each job."""
        decoder = self._decoder
        assert decoder is not None
        count = len(batch) if self.capture is None else 1 << (len(batch) - 1).bit_length()
        packed = torch.zeros(count, 3 + size * self.shape.config.n_codebooks, dtype=torch.int64, device="cpu")
        packed[:, 0] = decoder.streams  # the one that is not used
        for index, job in enumerate(batch):
            stream = job.stream
            packed[index, :3] = torch.tensor([stream._row, stream._fed, job.end], dtype=torch.int64, device="cpu")
            packed[index, 3:] = job.codes[:size].flatten()
        inside = all(decoder.first_sample(job.stream._fed) >= 0 and job.stream._fed + size <= job.end for job in batch)
        samples = self._decoded(decoder, packed, size, inside).float().cpu()
        self.batches += 1
        self.computed += size * len(batch)
        for job, made in zip(batch, samples, strict=False):
            self._take(job, made, size)

    def _take(self, job: _Job, made: Tensor, size: int) -> None:
        stream = job.stream
        first = self.shape.first_sample(stream._fed)
        stream._fed += size
        job.codes = job.codes[size:]
        job.samples.append(made[max(-first, 0) :])
        if not job.samples[-1].isfinite().all():
            job.codes = job.codes[:0]
            job.future.set_exception(NumericError(stream._codec.not_finite))
        elif not len(job.codes):
            job.future.set_result(torch.cat(job.samples))

    def _decoded(self, decoder: IncrementalDecoder, packed: Tensor, size: int, inside: bool) -> Tensor:
        key = len(packed), size
        graph = self._graphs.get(key)
        if graph is None and self.capture is not None and key in self._seen and len(self._graphs) < _GRAPHS:
            graph = self._graphs[key] = _Graph(decoder, packed, size, self.capture)
        self._seen.add(key)
        if graph is not None:
            return graph(packed)
        sent = packed if decoder.device.type == "cpu" else packed.pin_memory().to(decoder.device, non_blocking=True)
        return decoder.step(*_unpacked(sent, size), inside=inside)

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        device = self.shape.device
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            if self._cuda is None:
                self._cuda = torch.cuda.Stream()
                self._cuda.wait_stream(torch.cuda.default_stream())  # the weights may still be on their way
            with torch.cuda.stream(self._cuda):
                yield


class _Graph:
    """A step of one shape, captured. Its first piece must have been decoded without: that loads the kernels."""

    def __init__(self, decoder: IncrementalDecoder, packed: Tensor, size: int, capture: Capture) -> None:
        self.packed = torch.zeros_like(packed, device=decoder.device)
        self.packed[:, 0] = decoder.streams
        self.samples = torch.zeros(
            len(packed), size * decoder.config.hop_length, dtype=decoder.wide, device=decoder.device
        )
        self._replay = capture(lambda: self._run(decoder, size))

    def _run(self, decoder: IncrementalDecoder, size: int) -> None:
        self.samples.copy_(decoder.step(*_unpacked(self.packed, size)))

    def __call__(self, packed: Tensor) -> Tensor:
        self.packed.copy_(packed if self.packed.device.type == "cpu" else packed.pin_memory(), non_blocking=True)
        self._replay()
        return self.samples


def _unpacked(packed: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return packed[:, 0], packed[:, 1], packed[:, 2], packed[:, 3:].unflatten(1, (size, -1))


def _work(stage: "weakref.ref[Stage]", jobs: "SimpleQueue[_Job | None]") -> None:
    """Decode what is handed in, until None is."""
    while (job := jobs.get()) is not None:
        taken = [job]
        with contextlib.suppress(Empty):
            while (job := jobs.get_nowait()) is not None:
                taken.append(job)
            jobs.put(None)
        here = stage()
        if here is None:
            return
        try:
            here.run(taken)
        except BaseException as error:
            for item in taken:
                if not item.future.done():
                    item.future.set_exception(error)
        del here, taken, job


def _end(thread: threading.Thread, jobs: "SimpleQueue[_Job | None]") -> None:
    jobs.put(None)
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join(timeout=10)


def frames_to_feed(decoder: IncrementalDecoder, frames: int) -> int:
    """Frames after which all samples of a stream of so many are there."""
    total, fed = decoder.config.samples_of(frames), frames
    while decoder.first_sample(fed) < total:
        fed += 1
    return fed


def decode_long(decoder: IncrementalDecoder, codes: Tensor, samples: Tensor) -> None:
    """Decode a whole sound in pieces of `SPAN` frames into `samples`; decoder: for one stream, which it clears."""
    decoder.clear(0)
    frames, device = len(codes), codes.device
    codes = functional.pad(codes, (0, 0, 0, frames_to_feed(decoder, frames) - frames))
    row = torch.zeros(1, dtype=torch.int64, device=device)
    for fed in range(0, len(codes), SPAN):
        piece = codes[fed : fed + SPAN]
        first = decoder.first_sample(fed)
        made = decoder.step(
            row, row + fed, row + frames, piece[None], inside=first >= 0 and fed + len(piece) <= frames
        )[0]
        begin = max(first, 0)
        target = samples[begin : min(first + len(made), len(samples))]
        target.copy_(made[begin - first : begin - first + len(target)])
