"""Audio formats, written piece by piece to where nobody can seek: a socket.

libsndfile writes flac, mp3 and opus through a sink that keeps what is appended. At its end it goes back to write sizes
into the header of flac and mp3, which is long sent and is dropped: players read both without.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import soundfile
import soxr

from dia_fast.audio.audio import Samples, pcm16
from dia_fast.audio.editing import Tempo
from dia_fast.errors import InputError
from dia_fast.utils.files import uninterrupted

UNKNOWN_SIZE = 0xFFFF_FFFF
_SET_PAGE_LATENCY = 0x1302  # SFC_SET_OGG_PAGE_LATENCY_MS, which soundfile has no name for
_PAGE_MILLISECONDS = 50.0
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
PCM_RATE = 24_000
"""Of `pcm`, which tells no rate: that of the OpenAI API, which clients take for granted."""
# At a constant rate: libsndfile's own reader, and the seek bars of players, take the length of a file of variable rate
# from the rewritten first frame. 80 kbit/s at 16 to 24 kHz, 160 above.
_MP3 = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
LOWEST, HIGHEST = 8_000, 48_000


class Encoder(Protocol):
    """Takes samples and gives bytes."""

    def write(self, samples: Samples) -> bytes:
        """Encode mono samples, float32 `[n]`; what is not complete yet comes later."""

    def close(self) -> bytes:
        """Return the last bytes."""


@dataclass(frozen=True)
class Format:
    """A `response_format`: its Content-Type, and the rate it takes for a model's own."""

    name: str
    media_type: str
    rate: Callable[[int], int]
    make: Callable[[int], Encoder]

    def rate_for(self, native: int, wanted: int | None) -> int:
        """The rate to write: as asked for, or the best for the model's own.

        Raises:
            InputError: For a value that cannot be used.
        """
        if wanted is None:
            return self.rate(native)
        if not LOWEST <= wanted <= HIGHEST:
            raise InputError(f"sample_rate must be from {LOWEST} to {HIGHEST}, not {wanted}")
        if self.rate(wanted) != wanted and self.name != "pcm":
            raise InputError(f"sample_rate {wanted} does not exist in {self.name}; use {self.rate(wanted)}")
        return wanted


class _Pcm:
    def write(self, samples: Samples) -> bytes:
        return pcm16(samples)

    def close(self) -> bytes:
        return b""


class _Wav(_Pcm):
    """16-bit PCM behind a header whose sizes say "until the end"."""

    def __init__(self, rate: int) -> None:
        form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
        self._header = struct.pack("<4sI4s4sI", b"RIFF", UNKNOWN_SIZE, b"WAVE", b"fmt ", len(form)) + form
        self._header += struct.pack("<4sI", b"data", UNKNOWN_SIZE)

    def write(self, samples: Samples) -> bytes:
        header, self._header = self._header, b""
        return header + pcm16(samples)


class _Sink:
    """A file for a writer that may seek back: what was taken already stays as it was."""

    def __init__(self) -> None:
        self._fresh = bytearray()
        self._position = self._end = 0

    def write(self, data: Any) -> int:
        data = bytes(data)
        new = data[max(0, self._end - self._position) :] if self._position < self._end else data
        self._fresh += new
        self._position += len(data)
        self._end = max(self._end, self._position)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        return b""

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        taken = bytes(self._fresh)
        self._fresh.clear()
        return taken


class _Sndfile:
    """flac, mp3 or opus by libsndfile."""

    def __init__(self, rate: int, container: str, encoding: str, **extra: Any) -> None:
        self._sink = _Sink()
        with uninterrupted():
            self._file = soundfile.SoundFile(self._sink, "w", rate, 1, encoding, format=container, **extra)
        if encoding == "OPUS":
            latency = ctypes.c_double(_PAGE_MILLISECONDS)
            ffi, library = soundfile._ffi, soundfile._snd
            pointer = ffi.cast("void *", ctypes.addressof(latency))
            library.sf_command(self._file._file, _SET_PAGE_LATENCY, pointer, ctypes.sizeof(latency))

    def write(self, samples: Samples) -> bytes:
        if len(samples):
            with uninterrupted():
                self._file.write(np.clip(samples, -1.0, 1.0))
        return self._sink.take()

    def close(self) -> bytes:
        with uninterrupted():
            self._file.close()
        return self._sink.take()


class _Aac:
    """AAC in ADTS frames by PyAV."""

    def __init__(self, rate: int) -> None:
        import av

        self._av, self._sink, self._rate, self._samples = av, _Sink(), rate, 0
        self._container = av.open(self._sink, "w", format="adts", options={"flush_packets": "1"})
        self._stream: Any = self._container.add_stream("aac", rate=rate, layout="mono", bit_rate=96_000)

    def write(self, samples: Samples) -> bytes:
        if len(samples):
            frame = self._av.AudioFrame.from_ndarray(
                np.clip(samples, -1.0, 1.0)[None].astype(np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = self._rate, self._samples
            self._samples += len(samples)
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        return self._sink.take()

    def close(self) -> bytes:
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()
        return self._sink.take()


def _nearest(rates: tuple[int, ...]) -> Callable[[int], int]:
    return lambda rate: next((known for known in rates if known >= rate), rates[-1])


def _own(rate: int) -> int:
    return max(LOWEST, min(rate, HIGHEST))


FORMATS = {
    item.name: item
    for item in (
        Format("mp3", "audio/mpeg", _nearest(MP3_RATES), lambda rate: _Sndfile(rate, "MP3", "MPEG_LAYER_III", **_MP3)),
        Format("opus", "audio/ogg", _nearest(OPUS_RATES), lambda rate: _Sndfile(rate, "OGG", "OPUS")),
        Format("aac", "audio/aac", _nearest(MP3_RATES), _Aac),
        Format("flac", "audio/flac", _own, lambda rate: _Sndfile(rate, "FLAC", "PCM_16")),
        Format("wav", "audio/wav", _own, _Wav),
        Format("pcm", "audio/pcm", lambda rate: PCM_RATE, lambda rate: _Pcm()),
    )
}


def media_type(form: Format, rate: int) -> str:
    """The Content-Type of a format at a rate."""
    return f"{form.media_type};rate={rate};channels=1" if form.name == "pcm" else form.media_type


class Pipeline:
    """From the samples of the codec to the bytes of a response: speed, rate, format. For one thread at a time.

    Args:
        form: What to write.
        native: Rate of the samples that come in.
        rate: Rate to write.
        speed: 1 leaves the samples alone.
    """

    def __init__(self, form: Format, native: int, rate: int, speed: float = 1.0) -> None:
        self.form, self.rate = form, rate
        self._tempo = None if speed == 1.0 else Tempo(native, speed)
        self._resampler = None if rate == native else soxr.ResampleStream(native, rate, 1, "float32", "HQ")
        self._encoder = form.make(rate)
        self.samples = 0
        """Samples written."""

    def write(self, samples: Samples) -> bytes:
        """Take the next samples, float32 `[n]`."""
        return self._on(self._tempo.write(samples) if self._tempo else samples, last=False)

    def close(self) -> bytes:
        """Return what is left."""
        rest = self._tempo.close() if self._tempo else np.zeros(0, np.float32)
        return self._on(rest, last=True) + self._encoder.close()

    def _on(self, samples: Samples, *, last: bool) -> bytes:
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples, last=last)
        self.samples += len(samples)
        return self._encoder.write(samples)

    @property
    def seconds(self) -> float:
        """Of sound, as written so far."""
        return self.samples / self.rate


def warm_up() -> None:
    """Load what a first request would have to wait for."""
    for form in FORMATS.values():
        if form.name != "aac":
            form.make(form.rate(PCM_RATE)).close()
