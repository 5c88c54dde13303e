"""Change sound as servers for Dia do by hand: its speed, its silences, the part of a recording to speak after."""

import math

import numpy as np
from numpy.typing import NDArray

from dia_fast.audio.audio import Audio, Samples
from dia_fast.errors import InputError, shown
from dia_fast.utils.values import real_number

SLOWEST, FASTEST = 0.25, 4.0
LEAST_SECONDS, MOST_SECONDS = 10.0, 20.0  # of a recording that a voice is taken from
_BLOCK = 0.01  # seconds that are loud or silent as a whole
_QUIET = 0.02  # of the level of speech: 34 dB below it
_SPEECH = 95  # percentile of the levels of all blocks that is taken for the level of speech
_AIR = 0.08  # seconds of a pause that stay before and after the part of a recording
_FADE = 0.005  # seconds, at each join


def has_media() -> bool:
    """Tell whether PyAV is installed: for aac, and for a speed other than 1."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


class Tempo:
    """Change the speed and keep the pitch, piece by piece (FFmpeg's atempo, two in series below its lower end)."""

    def __init__(self, rate: int, speed: float) -> None:
        import av

        self._av, self._rate, self._samples = av, rate, 0
        self._graph = av.filter.Graph()
        source = self._graph.add_abuffer(sample_rate=rate, format="fltp", layout="mono")
        steps = [speed] if speed >= 0.5 else [speed**0.5] * 2
        chain = [source, *(self._graph.add("atempo", f"{step:.6f}") for step in steps)]
        chain.append(self._graph.add("abuffersink"))
        for before, after in zip(chain, chain[1:], strict=False):
            before.link_to(after)
        self._graph.configure()

    def write(self, samples: Samples) -> Samples:
        """Take the next samples, float32 `[n]`; return what is certain."""
        if not len(samples):
            return samples
        frame = self._av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = self._rate, self._samples
        self._samples += len(samples)
        self._graph.push(frame)
        return self._pull()

    def close(self) -> Samples:
        """Return the rest."""
        self._graph.push(None)
        return self._pull()

    def _pull(self) -> Samples:
        found = [np.zeros(0, np.float32)]
        while True:
            try:
                found.append(self._graph.pull().to_ndarray()[0])
            except (self._av.error.BlockingIOError, self._av.error.EOFError):
                return np.concatenate(found)


def checked_speed(speed: float) -> float:
    """Check a speed, and that there is what changes it. Raises InputError."""
    value = real_number("speed", speed)
    if not SLOWEST <= value <= FASTEST:
        raise InputError(f"speed must be from {SLOWEST:g} to {FASTEST:g}, not {shown(speed)}; 1 leaves it alone")
    if value != 1 and not has_media():
        raise InputError(f"speed {value:g} needs PyAV: pip install 'dia-fast[media]'")
    return value


def at_speed(audio: Audio, speed: float) -> Audio:
    """Return the sound `speed` times as fast, at the same pitch. Raises InputError (see `checked_speed`)."""
    speed = checked_speed(speed)
    if speed == 1 or not len(audio.samples):
        return audio
    tempo = Tempo(audio.sample_rate, speed)
    return _with(audio, np.concatenate([tempo.write(audio.samples), tempo.close()]))


def without_silence(audio: Audio, *, edge: float = 0.05, longest: float = 0.7, left: float = 0.4) -> Audio:
    """Cut silence at both ends, and long silence inside.

    Args:
        audio: Any sound; one that is silent as a whole is returned as it is.
        edge: Seconds of silence that stay before the first sound and after the last.
        longest: Seconds of the longest silence inside that is left alone.
        left: Seconds to which a longer one is cut.
    """
    silent, block = _silent_blocks(audio)
    loud = np.flatnonzero(~silent)
    if not len(loud):
        return audio
    keep = math.ceil(edge * audio.sample_rate)
    first = max(0, int(loud[0]) * block - keep)
    last = min(len(audio.samples), (int(loud[-1]) + 1) * block + keep)
    kept, start = [], first
    for low, high in _runs(silent):
        low, high = low * block, high * block
        if low > first and high < last and high - low > longest * audio.sample_rate:
            half = int(left * audio.sample_rate / 2)
            kept.append((start, low + half))
            start = high - half
    kept.append((start, last))
    return _with(audio, _joined([audio.samples[low:high] for low, high in kept], int(_FADE * audio.sample_rate)))


def best_part(audio: Audio, least: float = LEAST_SECONDS, most: float = MOST_SECONDS) -> tuple[Audio, float]:
    """Return the part of a recording that holds the most speech, from pause to pause, and the second it starts at.

    Args:
        audio: A recording; one of at most `most` seconds is returned as it is.
        least: Seconds that the part has at least.
        most: Seconds that it has at most.
    """
    if audio.duration <= most:
        return audio, 0.0
    silent, block = _silent_blocks(audio)
    rate = audio.sample_rate
    pauses = [(low, high) for low, high in _runs(silent) if (high - low) * block >= 2 * _AIR * rate]
    air = round(_AIR * rate)
    firsts = sorted({0, *(high * block - air for _, high in pauses if high < len(silent))})
    ends = sorted({len(audio.samples), *(low * block + air for low, _ in pauses if low)})
    speech = np.concatenate([[0], np.cumsum(~silent)])  # blocks of it before each block
    found = [
        (int(speech[min(high // block, len(silent))] - speech[low // block]), -low, high)
        for low in firsts
        for high in ends
        if least * rate <= high - low <= most * rate
    ]
    # Where nobody pauses: as much as may be, from the start on.
    _, low, high = max(found, default=(0, 0, int(most * rate)))
    return _with(audio, audio.samples[-low:high]), -low / rate


def _silent_blocks(audio: Audio) -> tuple[NDArray[np.bool_], int]:
    """Which blocks are silent, and the samples of a block; a last one that is not full counts as well."""
    block = max(1, round(_BLOCK * audio.sample_rate))
    padded = np.pad(audio.samples.astype(np.float64), (0, -len(audio.samples) % block)).reshape(-1, block)
    levels = np.sqrt(np.square(padded).mean(1))
    if not len(levels):
        return np.zeros(0, np.bool_), block
    return levels <= max(_QUIET * float(np.percentile(levels, _SPEECH)), 1e-5), block


def _runs(silent: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first, end) of each run of silent blocks."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(np.int8)))
    return [(int(low), int(high)) for low, high in edges.reshape(-1, 2)]


def _joined(parts: list[Samples], fade: int) -> Samples:
    """Parts one after the other, each faded out and in at a join, so that nothing clicks."""
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    whole = [part.copy() for part in parts]
    for before, after in zip(whole, whole[1:], strict=False):
        count = min(fade, len(before), len(after))
        if count:
            before[-count:] *= ramp[::-1][-count:]
            after[:count] *= ramp[:count]
    return np.concatenate(whole)


def _with(audio: Audio, samples: Samples) -> Audio:
    return Audio(samples, audio.sample_rate, audio.seed, audio.outcome)
