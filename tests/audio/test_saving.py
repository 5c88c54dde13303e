"""Writing audio: every format reads back, and a failed write leaves neither a new file nor a damaged old one."""

import base64
import errno
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dia_fast.audio.audio import FORMATS, Audio
from dia_fast.errors import InputError
from dia_fast.utils.files import replacing

RATE = 44_100
WAVE = (0.5 * np.sin(np.arange(RATE) / 20)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.wav", 2**-15), ("a.flac", 2**-15), ("a.ogg", 0.05), ("a.MP3", 0.05)]
)
def test_saved_files_read_back(tmp_path: Path, name: str, tolerance: float) -> None:
    path = Audio(WAVE, RATE).save(str(tmp_path / name))
    assert path == tmp_path / name
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE and samples.shape == WAVE.shape
    assert np.abs(samples - WAVE)[3000:-3000].max() <= tolerance


@pytest.mark.parametrize("extension", FORMATS)
def test_ten_minutes_and_one_sample(extension: str) -> None:
    # One long write to libsndfile's Vorbis encoder crashes the process.
    for count in (1, 8_000 * 600):
        assert len(Audio(np.zeros(count, np.float32), 8_000).to_bytes(extension)) > 40


def test_louder_than_full_scale_is_clipped(tmp_path: Path) -> None:
    samples, _ = soundfile.read(Audio(np.array([2, -3, 0.5], np.float32), RATE).save(tmp_path / "a.wav"))
    np.testing.assert_allclose(samples, [1, -1, 0.5], atol=2**-15)


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = Audio(WAVE, RATE).save(tmp_path / "a.wav")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("old")
    Audio(WAVE, RATE).save(tmp_path / "a.wav")
    assert soundfile.info(tmp_path / "a.wav").frames == RATE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a", r"extension '' is not one of \.wav, \.flac, \.ogg, \.mp3"),
        ("a.m4a", r"extension '\.m4a' is not one of \.wav, \.flac, \.ogg, \.mp3"),
        ("none/a.wav", "the folder .*none does not exist; create it first"),
        ("file/a.wav", "the folder .*file does not exist"),
        ("folder.wav", "it is a folder"),
        ("a" * 300 + ".wav", "File name too long"),
    ],
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.wav").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        Audio(WAVE, RATE).save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write into a read-only folder")
def test_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    with pytest.raises(InputError, match="Permission denied"):
        Audio(WAVE, RATE).save(folder / "a.wav")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("step", ["write_bytes", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_refusals_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int) -> None:
    (tmp_path / "a.wav").write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path if step == "write_bytes" else os, step, refuse)
    with pytest.raises(InputError, match=f"cannot write .*a.wav: {re.escape(os.strerror(code))}"):
        Audio(WAVE, RATE).save(tmp_path / "a.wav")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_text() == "old"


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """The system's own limit on file size fails the write half way, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(InputError, match="cannot write .*: File too large"):
            Audio(WAVE, RATE).save(tmp_path / "a.wav")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        with replacing(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half")
            raise error
    assert not list(tmp_path.iterdir())


def test_audio_checks_its_samples() -> None:
    for samples, message in [
        (np.zeros((10, 2), np.float32), r"mono, shape \[n\]; got shape \[10, 2\]"),
        (np.zeros(4, np.int16), "not int16"),
        (np.array([0, np.nan]), "sample 1 is nan"),
        (np.float32(0), r"got shape \[\]"),
    ]:
        with pytest.raises(InputError, match=message):
            Audio(samples, RATE)


def test_audio_describes_itself() -> None:
    audio = Audio(WAVE[: RATE // 2], RATE)
    assert audio.duration == 0.5
    assert repr(audio) == "Audio(0.50 s at 44100 Hz)"
    assert Audio(WAVE.astype(np.float64), np.int64(RATE)).samples.dtype == np.float32  # type: ignore[arg-type]
    assert audio.resampled(22_050).samples.shape == (RATE // 4,)
    assert audio.resampled(22_050).sample_rate == 22_050


def test_the_notebook_player_holds_the_wav() -> None:
    html = Audio(WAVE, RATE)._repr_html_()
    match = re.fullmatch(r'<audio controls src="data:audio/wav;base64,([A-Za-z0-9+/=]+)"></audio>', html)
    assert match
    assert base64.b64decode(match[1]) == Audio(WAVE, RATE).to_bytes("wav")


def test_empty_audio_is_shown_but_not_written(tmp_path: Path) -> None:
    audio = Audio(np.zeros(0, np.float32), RATE)
    assert "empty" in audio._repr_html_()
    with pytest.raises(InputError, match="no samples"):
        audio.save(tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rate", "format", "message"), [(RATE, "aac", "'aac'; supported: .wav"), (44_000, "mp3", "48000")]
)
def test_formats_that_cannot_be_had(rate: int, format: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Audio(WAVE, rate).to_bytes(format)
