"""Audio in and out: any file that libsndfile reads becomes mono samples; samples become a file, bytes or a player."""

import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from dia_fast.audio.truncation import cut_off
from dia_fast.errors import AudioWarning, InputError, shown
from dia_fast.generation.outcome import Outcome
from dia_fast.utils.files import LARGEST_SOUND, NotingFile, checked_path, open_regular, replacing, uninterrupted
from dia_fast.utils.warn import warn

Samples = NDArray[np.float32]

# Outside this range encoders fail (libvorbis crashes the process at 0 Hz) and resampling may need any amount of memory.
LOWEST_RATE, HIGHEST_RATE = 2_000, 768_000
MAX_CHANNELS = 64
LOUDEST = 100.0  # of full scale: a file of floats may be too loud, but not by 40 dB
# libsndfile's Vorbis encoder overflows its stack on one very long write.
BLOCK = 1 << 16

# Extension -> libsndfile's names of container and encoding.
FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aiff": ("AIFF", "PCM_16"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Audio:
    """Mono sound. In a notebook it shows as a player.

    Args:
        samples: `[n]` float32, full scale is -1 to 1.
        sample_rate: Samples per second.
        seed: Of generated sound, the seed that speaks it again.
        outcome: Of generated sound, what became of its text. It is None of a chunk of a stream, which has one itself.

    Raises:
        InputError: If samples are not one-dimensional, or hold NaN or infinity.
    """

    samples: Samples
    sample_rate: int
    seed: int | None = None
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        samples = _as_float32(self.samples)
        if samples.ndim != 1:
            raise InputError(f"samples: Audio is mono, shape [n]; got shape {list(samples.shape)}")
        _require_finite(samples, "samples")
        object.__setattr__(self, "samples", samples)
        object.__setattr__(self, "sample_rate", _checked_rate(self.sample_rate, "sample_rate"))

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / self.sample_rate

    def __repr__(self) -> str:
        return f"Audio({self.duration:.2f} s at {self.sample_rate} Hz)"

    def resampled(self, sample_rate: int) -> "Audio":
        """Resample the sound (soxr, high quality).

        Args:
            sample_rate: Samples per second of the result.
        """
        return Audio(convert(self.samples, self.sample_rate, sample_rate), sample_rate, self.seed, self.outcome)

    def to_bytes(self, format: str = "wav") -> bytes:
        """Encode the sound as the contents of a file. Louder than full scale is clipped.

        Args:
            format: `"wav"`, `"flac"`, `"ogg"`, `"mp3"` or `"aiff"`.

        Raises:
            InputError: For another format, for one that cannot hold this sample rate, and for no samples at all.
        """
        if not isinstance(format, str):
            raise InputError(f"format must be one of {', '.join(FORMATS)}, not {shown(format)}")
        extension = "." + format.lower().removeprefix(".")
        if extension not in FORMATS:
            raise InputError(f"unknown audio format {format!r}; supported: {', '.join(FORMATS)}")
        if not len(self.samples):
            raise InputError("there are no samples to write: the audio is empty")
        container, encoding = FORMATS[extension]
        buffer = io.BytesIO()
        try:
            with (
                uninterrupted(),
                soundfile.SoundFile(buffer, "w", self.sample_rate, 1, encoding, format=container) as file,
            ):
                for start in range(0, len(self.samples), BLOCK):
                    file.write(np.clip(self.samples[start : start + BLOCK], -1.0, 1.0))
        except soundfile.LibsndfileError as error:
            raise InputError(
                f"cannot write {self.sample_rate} Hz audio as {container}: {error.error_string}"
            ) from error
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file, complete or not at all; return its path.

        Args:
            path: Its extension names the format: .wav, .flac, .ogg, .mp3 or .aiff (16 bit or lossy).

        Raises:
            InputError: For an unknown extension, a missing or read-only folder, a full disk; an existing file is
                untouched then.
        """
        path = checked_path(path)
        if path.suffix.lower() not in FORMATS:
            raise InputError(f"cannot write {path}: extension {path.suffix!r} is not one of {', '.join(FORMATS)}")
        data = self.to_bytes(path.suffix)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        return path

    def _repr_html_(self) -> str:
        if not len(self.samples):
            return "<em>empty audio</em>"
        data = base64.b64encode(self.to_bytes("wav")).decode("ascii")
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'


def pcm16(samples: Samples) -> bytes:
    """Samples `[n]` as 16-bit little-endian integers, without a header: what a `.wav` file of them holds."""
    buffer = io.BytesIO()
    # Raw samples tell no rate.
    with uninterrupted(), soundfile.SoundFile(buffer, "w", LOWEST_RATE, 1, "PCM_16", "LITTLE", "RAW") as file:
        file.write(np.clip(samples, -1.0, 1.0))
    return buffer.getvalue()


@contextlib.contextmanager
def growing_file(path: str | os.PathLike[str], sample_rate: int) -> Iterator[Callable[[Samples], None]]:
    """A file like that of `Audio.save`, written piece by piece: yields what takes the next samples, float32 `[n]`.

    The file appears at the end of the block, complete; if the block raises, nothing is left behind. Raises as `save`.
    """
    path = checked_path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: extension {path.suffix!r} is not one of {', '.join(FORMATS)}")
    container, encoding = FORMATS[path.suffix.lower()]
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as opened:
        noting = NotingFile(opened)
        try:
            with uninterrupted():
                file = soundfile.SoundFile(noting, "w", sample_rate, 1, encoding, format=container)

            def write(samples: Samples) -> None:
                with uninterrupted():
                    for start in range(0, len(samples), BLOCK):
                        file.write(np.clip(samples[start : start + BLOCK], -1.0, 1.0))
                noting.check()

            try:
                yield write
            finally:
                with uninterrupted():
                    file.close()
            noting.check()
        except (soundfile.LibsndfileError, AssertionError) as error:
            noting.check()
            if isinstance(error, AssertionError):
                raise
            raise InputError(f"cannot write {path} ({sample_rate} Hz {container}): {error.error_string}") from error


def load_audio(
    path: str | os.PathLike[str], sample_rate: int, *, min_seconds: float = 0.02, max_seconds: float | None = None
) -> Samples:
    """Read an audio file as mono float32 `[n]` at `sample_rate`: channels are averaged, other rates resampled by soxr.

    Raises InputError for a path that is missing, a folder, unreadable, empty, not audio or damaged, for NaN or infinite
    samples, for less than `min_seconds` or more than `max_seconds` of sound. Warns of a file that is cut off.
    Script stops at `max_seconds`, whatever the file's header claims.
    """
    path = checked_path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; give an audio file")
        with open_regular(path, LARGEST_SOUND) as file:
            if not os.fstat(file.fileno()).st_size:
                raise InputError(f"{path}: the file is empty")
            lack = cut_off(file)
            file.seek(0)
            mono, rate = _read_mono(file, path, max_seconds)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    _require_finite(mono, str(path))
    if len(mono) < max(min_seconds * rate, 1):
        seconds = f"{len(mono)} samples at {rate} Hz are {len(mono) / rate:.4f} s"
        raise InputError(f"{path}: too short: {seconds}; at least {min_seconds:g} s are needed")
    if lack is not None:
        told = f"{path}: the file is cut off: {lack}; the {len(mono) / rate:.2f} s that are left are used"
        warn(told, AudioWarning)
    return convert(mono, rate, sample_rate)


def _read_mono(file: Any, path: Path, max_seconds: float | None) -> tuple[Samples, int]:
    # TypeError: libsndfile takes a .raw name for headerless data and wants to be told its rate.
    try:
        with uninterrupted(), soundfile.SoundFile(file) as sound:
            rate = _checked_rate(sound.samplerate, str(path))
            # Block by block: the length in a damaged header may be anything.
            blocks: list[Samples] = []
            count = 0
            while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1, dtype=np.float32))
                count += len(block)
                if max_seconds is not None and count > max_seconds * rate:
                    raise InputError(f"{path}: longer than {max_seconds:g} s; use a shorter recording")
    except (soundfile.LibsndfileError, TypeError) as error:
        reason = getattr(error, "error_string", "headerless data").rstrip(". ")
        raise InputError(f"{path}: not audio, or damaged: {reason}; wav, flac, ogg, mp3 and aiff work") from error
    return (np.concatenate(blocks) if blocks else np.zeros(0, np.float32)), rate


def convert(samples: Any, from_rate: int, to_rate: int) -> Samples:
    """Any float samples, `[n]` or `[n, channels]`, as mono float32 `[n * to_rate / from_rate]` (mean of the channels).

    Raises InputError for integer samples, another shape, NaN or infinity, or a rate outside 2 kHz to 768 kHz.
    """
    from_rate, to_rate = _checked_rate(from_rate, "from_rate"), _checked_rate(to_rate, "to_rate")
    wide = _as_float32(samples)
    if wide.ndim == 2 and 1 <= wide.shape[1] <= MAX_CHANNELS:
        wide = wide.mean(axis=1, dtype=np.float32)
    if wide.ndim != 1:
        raise InputError(
            f"samples: expected shape [samples] or [samples, channels] with up to {MAX_CHANNELS} channels, got "
            f"{list(wide.shape)}"
        )
    _require_finite(wide, "samples")
    peak = np.abs(wide).max(initial=0)
    if peak > LOUDEST:
        raise InputError(
            f"samples reach {peak:.6g}, and full scale is -1 to 1: if they are on the scale of 16-bit integers, divide "
            "them by 32768"
        )
    if from_rate != to_rate:
        wide = soxr.resample(wide, from_rate, to_rate, quality="HQ")
    wide = np.ascontiguousarray(wide)
    return wide if wide.flags.writeable else wide.copy()  # torch warns of memory that it may not write to


def _as_float32(samples: Any) -> Samples:
    try:
        array = np.asarray(samples)
    except (TypeError, ValueError, RuntimeError):  # lists of several lengths, tensors that are not dense
        raise InputError(f"samples must be an array of numbers, not {shown(samples)}") from None
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"samples must be floating point from -1 to 1, not {array.dtype}; divide int16 by 32768")
    with np.errstate(over="ignore"):  # becomes infinity, which is refused with its position
        return np.asarray(array, dtype=np.float32)


def _checked_rate(rate: Any, name: str) -> int:
    if isinstance(rate, float | np.floating) and float(rate).is_integer():
        rate = int(rate)
    if not isinstance(rate, int | np.integer) or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise InputError(
            f"{name}: sample rate {shown(rate)} is not a whole number of Hz from {LOWEST_RATE} to {HIGHEST_RATE}"
        )
    return int(rate)


def _require_finite(samples: Samples, name: str) -> None:
    starts = range(0, len(samples), BLOCK)
    counts = [len(block) - np.count_nonzero(np.isfinite(block)) for block in (samples[i : i + BLOCK] for i in starts)]
    if any(counts):
        bad = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise InputError(f"{name}: sample {bad} is {samples[bad]}, one of {sum(counts)} that are not finite numbers")
