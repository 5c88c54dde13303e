"""Reading audio: every format, rate and channel count comes out as mono float32, or is refused with a reason."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dia_fast.audio.audio import MAX_CHANNELS, Audio, convert, load_audio
from dia_fast.errors import InputError

RATE = 44_100


def tone(rate: int, seconds: float = 0.5, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_channel_count(tmp_path: Path, rate: int, channels: int) -> None:
    wave = tone(rate)
    # Channels of different loudness whose mean is the tone itself.
    gains = np.arange(1, channels + 1) / np.arange(1, channels + 1).mean()
    soundfile.write(tmp_path / "a.wav", wave[:, None] * gains.astype(np.float32), rate, subtype="FLOAT")
    loaded = load_audio(tmp_path / "a.wav", RATE)
    assert loaded.dtype == np.float32
    assert loaded.shape == (RATE // 2,)
    middle = slice(RATE // 10, 4 * RATE // 10)  # the resampler's filter rings at both ends
    np.testing.assert_allclose(loaded[middle], tone(RATE)[middle], atol=2e-4)


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "PCM_24", 2**-23),
        ("a.wav", "DOUBLE", 0.0),
        ("a.flac", "PCM_16", 2**-15),
        ("a.aiff", "PCM_16", 2**-15),
        ("a.ogg", "VORBIS", 0.05),
        ("a.mp3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_any_format(tmp_path: Path, name: str, subtype: str, tolerance: float) -> None:
    soundfile.write(tmp_path / name, tone(RATE), RATE, subtype=subtype)
    loaded = load_audio(tmp_path / name, RATE)
    assert len(loaded) == RATE // 2
    middle = slice(2000, -2000)
    assert np.abs(loaded - tone(RATE))[middle].max() <= tolerance


def test_the_extension_does_not_matter(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    for name in ("voice", "voice.txt", "voice.mp3"):
        (tmp_path / name).write_bytes((tmp_path / "a.wav").read_bytes())
        assert len(load_audio(tmp_path / name, RATE)) == RATE // 2


def test_samples_above_full_scale_are_kept(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "loud.wav", 3 * tone(RATE), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "loud.wav", RATE), 3 * tone(RATE))


def written(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def poisoned(value: float) -> np.ndarray:
    wave = tone(RATE)
    wave[1234] = value
    return wave


def truncated(path: Path) -> Path:
    soundfile.write(path, tone(RATE), RATE)
    path.write_bytes(path.read_bytes()[:20])
    return path


BAD_FILES = {
    "missing": (lambda folder: folder / "none.wav", r"none\.wav: no such file"),
    "folder": (lambda folder: folder, "is a folder; give an audio file"),
    "name too long": (lambda folder: folder / ("a" * 300), "cannot be looked up: File name too long"),
    "empty file": (lambda folder: (folder / "e.wav").touch() or folder / "e.wav", r"e\.wav: the file is empty"),
    "text": (lambda folder: (folder / "t.wav").write_text("hello") and folder / "t.wav", "not audio, or damaged"),
    "headerless": (lambda folder: (folder / "t.raw").write_bytes(b"12") and folder / "t.raw", "not audio, or damaged"),
    "cut in the header": (lambda folder: truncated(folder / "c.wav"), "not audio, or damaged"),
    "NaN": (lambda folder: written(folder / "n.wav", poisoned(np.nan)), "sample 1234 is nan, one of 1 that are not"),
    "infinity": (lambda folder: written(folder / "i.wav", poisoned(-np.inf)), "sample 1234 is -inf"),
    "no samples": (lambda folder: written(folder / "z.wav", tone(RATE)[:0]), "too short: 0 samples at 44100 Hz"),
    "one sample": (lambda folder: written(folder / "o.wav", tone(RATE)[:1]), "too short: 1 samples .* at least 0.02 s"),
    "one sample at 192 kHz": (lambda folder: written(folder / "o.wav", tone(RATE)[:1], 192_000), "too short: 1 sample"),
    "rate of 100 Hz": (lambda folder: written(folder / "r.wav", tone(RATE), 100), "sample rate 100 is not"),
    "rate of 1 GHz": (lambda folder: written(folder / "r.wav", tone(RATE), 10**9), "sample rate 1000000000 is not"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_their_reason(tmp_path: Path, case: str) -> None:
    make, message = BAD_FILES[case]
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        load_audio(path, RATE)
    assert str(path) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("path", ["", None, 3, b"a.wav", "a\0b.wav"])
def test_what_is_not_a_path(path: object) -> None:
    with pytest.raises(InputError, match="path"):
        load_audio(path, RATE)  # type: ignore[arg-type]


def test_an_unknown_home_folder_is_a_missing_file() -> None:
    with pytest.raises(InputError, match="no such file"):
        load_audio("~no-such-user-here/a.wav", RATE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(InputError, match="not a regular file"):
        load_audio(tmp_path / "pipe.wav", RATE)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.wav", tone(RATE))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read anything, so file modes prove nothing
    with pytest.raises(InputError, match=r"a\.wav: cannot be read: Permission denied"):
        load_audio(path, RATE)


def test_one_sample_is_accepted_where_the_caller_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "o.wav", tone(RATE)[100:101])
    assert load_audio(path, RATE, min_seconds=0.0).shape == (1,)


def test_too_long_is_refused_before_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "long.wav", np.zeros(30 * RATE, np.float32))
    assert len(load_audio(path, RATE, max_seconds=30)) == 30 * RATE
    reads = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: reads.append(1) or read(*a, **k))
    with pytest.raises(InputError, match="longer than 2.5 s"):
        load_audio(path, RATE, max_seconds=2.5)
    assert len(reads) == 2  # of 21 blocks


@given(
    samples=arrays.arrays(
        np.float32,
        st.one_of(st.tuples(st.integers(0, 400)), st.tuples(st.integers(0, 400), st.integers(1, 3))),
        elements=st.floats(-1, 1, width=32),
    ),
    rates=st.tuples(st.sampled_from([8_000, 44_100, 192_000]), st.sampled_from([22_050, 44_100])),
)
def test_convert_gives_the_length_that_the_rates_say(samples: np.ndarray, rates: tuple[int, int]) -> None:
    converted = convert(samples, *rates)
    assert converted.dtype == np.float32 and converted.ndim == 1
    assert abs(len(converted) - len(samples) * rates[1] / rates[0]) <= 1
    assert np.isfinite(converted).all()
    if rates[0] == rates[1]:
        np.testing.assert_allclose(
            converted, samples if samples.ndim == 1 else samples.mean(axis=1), rtol=0,
            atol=0 if samples.ndim == 1 else 2 * samples.shape[1] * 2.0**-24,
        )  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 2, 2), np.float32), r"got \[2, 2, 2\]"),
        (np.zeros((2, MAX_CHANNELS + 1), np.float32), r"\[samples, channels\] .* got \[2, 65\]"),
        (np.float32(1), r"got \[\]"),
        (np.array([0.0, -12_000.0], np.float32), r"samples reach 12000, and .* divide them by 32768"),
        (np.zeros(4, np.int16), "not int16; divide int16 by 32768"),
        (np.zeros(4, complex), "not complex128"),
        (["a"], "not <U1"),
        (np.array([0, 1e300]), "sample 1 is inf"),
    ],
)
def test_arrays_that_are_not_sound(samples: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(samples, RATE, RATE)


@pytest.mark.parametrize("rate", [0, -44_100, 1_999, 768_001, 44_100.5, "44100", True, None])
def test_impossible_rates(rate: object) -> None:
    for attempt in (lambda: convert(tone(RATE), rate, RATE), lambda: convert(tone(RATE), RATE, rate)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="sample rate"):
            attempt()
    with pytest.raises(InputError, match="sample_rate: sample rate"):
        Audio(tone(RATE), rate)  # type: ignore[arg-type]
