"""`dia-fast speak --stream`: into a file that appears complete or not at all, or down a pipe while it is generated."""

import io
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from dia_fast import Audio
from dia_fast.audio.audio import growing_file
from dia_fast.audio.codec.stage import CodecStream
from dia_fast.cli import main
from dia_fast.engine import batch_rows
from dia_fast.errors import InputError
from tests.helpers.front import TEXT, make_codec, make_model, tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `model` and a `codec`."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder / "model")
    make_codec(folder / "codec")
    return folder


@pytest.fixture
def speak(home: Path) -> list[str]:
    """The beginning of a `speak` command."""
    model = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu"]
    return ["speak", TEXT, *model, "--max-new-tokens", "60", "--seed", "3"]


@pytest.mark.parametrize("extension", ["wav", "flac"])
def test_a_streamed_file_holds_what_the_file_of_one_call_holds(
    speak: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], extension: str
) -> None:
    one, streamed = tmp_path / f"one.{extension}", tmp_path / f"streamed.{extension}"
    assert main([*speak, "-o", str(one)]) == 0
    assert "first sound" not in capfd.readouterr().out
    assert main([*speak, "-o", str(streamed), "--stream", "--chunk-seconds", "0.1"]) == 0
    output = capfd.readouterr()
    assert output.out.startswith(f"{streamed}: 0.51 s of sound at 44100 Hz, 61 steps in ")
    assert re.search(r"x realtime\), first sound after \d+\.\d\d s, seed 3\n$", output.out)
    assert "warning: speech was cut after 60 steps" in output.err and "step/s" not in output.err
    expected, found = (soundfile.read(path, dtype="int16")[0] for path in (one, streamed))
    assert soundfile.info(streamed).subtype == "PCM_16"
    # What rounding changes by a millionth may round to the next integer.
    assert np.abs(expected.astype(int) - found).max() <= 1 and np.ptp(expected) > 1000
    assert sorted(tree(tmp_path)) == sorted(path.name for path in (one, streamed))


def test_standard_output_gets_the_same_samples_and_nothing_else(
    speak: list[str], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main([*speak, "-o", str(tmp_path / "out.wav"), "--stream", "-q"]) == 0
    assert main([*speak, "-o", "-", "--stream"]) == 0
    output = capfdbinary.readouterr()
    samples = np.frombuffer(output.out, "<i2")
    np.testing.assert_array_equal(samples, soundfile.read(tmp_path / "out.wav", dtype="int16")[0])
    assert b"standard output: 0.51 s of sound" in output.err and b"first sound after" in output.err
    assert list(tree(tmp_path)) == ["out.wav"]


def command(speak: list[str], *more: str, code: str = "") -> list[str]:
    start = f"import sys, time\nfrom dia_fast.cli import main\n{code}\nsys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", start, *speak, *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


# Waits for a line on standard input before each step from the 40th on.
PATIENT = """
from dia_fast.model.model import DiaModel
real, steps = DiaModel.decode_step, []
def step(self, state):
    steps.append(0)
    if len(steps) >= 40: sys.stdin.readline()
    real(self, state)
DiaModel.decode_step = step
"""


def test_a_player_hears_the_beginning_while_the_rest_is_generated(speak: list[str]) -> None:
    """The first chunk is there after 9 + 10 + 16 steps, and the run goes no further than we let it."""
    arguments = command(speak, "-o", "-", "--stream", "--chunk-seconds", "0.116", "-q", code=PATIENT)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes, env=environment()) as running:
        first = running.stdout.read(2 * 512 * 9)  # type: ignore[union-attr]
        assert len(first) == 2 * 512 * 9 and running.poll() is None
        rest, errors = running.communicate(b"\n" * 100)
    assert running.returncode == 0, errors
    assert len(first + rest) == 2 * 512 * 44


def test_a_reader_that_goes_away_ends_it_without_a_word(speak: list[str]) -> None:
    arguments = command(speak, "-o", "-", "--stream", "--chunk-seconds", "0.02", "-q", code=PATIENT)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes, env=environment()) as running:
        running.stdout.read(100)  # type: ignore[union-attr]
        running.stdout.close()  # type: ignore[union-attr]
        running.stdin.write(b"\n" * 100)  # type: ignore[union-attr]
        running.stdin.close()  # type: ignore[union-attr]
        assert running.wait(120) == 0
        assert running.stderr.read() == b""  # type: ignore[union-attr]


def test_ctrl_c_ends_with_130_and_leaves_nothing(speak: list[str], tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom dia_fast.audio.codec.stage import CodecStream\nreal = CodecStream.decode_span\n"
        "def decode(self, codes, start, stop):\n"
        "    if start: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(self, codes, start, stop)\n"
        "CodecStream.decode_span = decode"
    )
    arguments = command(speak, "-o", str(tmp_path / "out.wav"), "--stream", "--chunk-seconds", "0.1", code=code)
    found = subprocess.run(arguments, capture_output=True, text=True, env=environment())
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "dia-fast: interrupted\n")
    assert not tree(tmp_path)


def test_a_failure_leaves_the_old_file(
    speak: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, real = tmp_path / "out.wav", CodecStream.decode_span
    path.write_bytes(b"old")

    def broken(self: CodecStream, codes: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if start:
            raise ZeroDivisionError("planted")
        return real(self, codes, start, stop)

    monkeypatch.setattr(CodecStream, "decode_span", broken)
    assert main([*speak, "-o", str(path), "--stream", "--chunk-seconds", "0.1"]) == 1
    assert "ZeroDivisionError: planted" in capfd.readouterr().err
    assert tree(tmp_path) == {"out.wav": b"old"}


def test_a_speech_without_sound_writes_no_file(
    speak: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = batch_rows.collect
    monkeypatch.setattr(batch_rows, "collect", lambda *args: replace(real(*args), frames=real(*args).frames[:0]))
    command = [*speak, "--max-new-tokens", "30", "-o", str(tmp_path / "out.wav"), "--stream"]
    assert main(command) == 1
    assert "the model ended the speech before it began" in capfd.readouterr().err
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "-"], "it needs --stream"),
        (["-o", "out.wav", "--chunk-seconds", "1"], "--chunk-seconds needs --stream"),
        (["-o", "out.wav", "--stream", "--chunk-seconds", "0"], "--chunk-seconds must be a number above 0"),
        (["-o", "out.wav", "--stream", "--chunk-seconds", "nan"], "--chunk-seconds must be a number above 0"),
        (["-o", "out.pcm", "--stream"], "its extension must be one of"),
    ],
)
def test_options_that_make_no_sense(
    speak: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*speak, *options]) == 2
    output = capfd.readouterr()
    assert message in output.err and output.out == ""
    assert not tree(tmp_path)


def test_a_terminal_is_no_player(
    speak: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*speak, "-o", "-", "--stream"]) == 2
    assert "standard output is a terminal" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_behind_standard_output_is_said(speak: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        arguments = command(speak, "-o", "-", "--stream", "-q")
        found = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert found.returncode == 2
    assert found.stderr.endswith("dia-fast: error: cannot write to standard output: No space left on device\n")


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "WAV"])
def test_a_growing_file_equals_one_that_is_saved(tmp_path: Path, extension: str) -> None:
    samples = np.random.default_rng(1).uniform(-1.2, 1.2, 30_000).astype(np.float32)
    expected = Audio(samples, 44_100).save(tmp_path / f"one.{extension}")
    path = tmp_path / f"many.{extension}"
    with growing_file(path, 44_100) as write:
        for part in np.split(samples, [1, 700, 700, 25_000]):
            write(part)
        assert not path.exists()
    found, wanted = (soundfile.read(io.BytesIO(item.read_bytes()))[0] for item in (path, expected))
    # An encoder of Vorbis begins with a block as long as the first write.
    settled = 256 if extension == "ogg" else 0
    np.testing.assert_array_equal(found[settled:], wanted[settled:])


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(InputError, match="cannot write .*out.wav"):
            with growing_file(tmp_path / "out.wav", 44_100) as write:
                for _ in range(20):
                    write(np.zeros(1000, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not tree(tmp_path)
