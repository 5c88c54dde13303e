"""Commands as processes: killed, interrupted, with closed streams, full disks, links, pipes and foreign files."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from dia_fast.audio.audio import Audio, load_audio
from dia_fast.cli import main
from dia_fast.errors import AudioWarning, InputError
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.jobs.items import Defaults, identity_of, read_items
from dia_fast.jobs.runner import Batch
from tests.helpers.front import TEXT, make_codec, make_model, tree

ROOT = Path(__file__).resolve().parents[2]
RATE = 44_100
LONG = " ".join(["[S1] Good morning. [S2] Thank you."] * 8)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and descriptors")


def start(*command: str, close: str = "", cwd: Path = ROOT, **streams: Any) -> "subprocess.Popen[bytes]":
    """A command in a process of its own; close: as a shell writes it."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "dia_fast", *command]
    if close:
        arguments = ["sh", "-c", f'exec "$@" {close}', "sh", *arguments]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(arguments, env=environment, cwd=cwd, **given)


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, str, str]:
    output, error = process.communicate(timeout=60)
    return process.returncode, (output or b"").decode(), (error or b"").decode()


@pytest.mark.parametrize(
    ("close", "stream"), [(">&-", ()), ("2>&-", ()), ("2>&-", ("--stream",)), ("<&- >&- 2>&-", ("--stream",))]
)
def test_closed_streams_are_no_error(tmp_path: Path, close: str, stream: tuple[str, ...]) -> None:
    process = start("speak", "[S1] The house is old.", *stream, "-o", str(tmp_path / "a.wav"), close=close)
    assert ended(process)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"] and len(soundfile.read(tmp_path / "a.wav")[0])


@pytest.mark.parametrize("command", [["plan", "--gpu", "h100"], ["info", "demo"], ["--help"], ["plan"]])
def test_every_command_takes_closed_streams(command: list[str]) -> None:
    assert ended(start(*command, close=">&- 2>&-"))[0] == (2 if command == ["plan"] else 0)


def test_sound_for_a_closed_stream_is_refused() -> None:
    status, _, error = ended(start("speak", "[S1] Hello.", "-q", "--stream", "-o", "-", close=">&-"))
    assert status == 2 and error == (
        "dia-fast: error: -o - writes to standard output, and that is closed: send it to a player or a file\n"
    )
    assert ended(start("speak", "--file", "-", close="<&-"))[2].endswith("standard input is closed\n")


def test_readers_that_go_away(tmp_path: Path) -> None:
    """Of standard output: nothing is left to do. Of standard error: the work goes on."""
    reading, writing = os.pipe()
    os.close(reading)
    assert ended(start("plan", "--gpu", "h100", stdout=writing))[::2] == (0, "")
    assert ended(start("--help", stdout=writing))[::2] == (0, "")
    command = ["speak", "[S1] Yes.", "-o", str(tmp_path / "a.wav")]
    assert ended(start(*command, stdout=writing, stderr=writing))[0] == 0
    os.close(writing)
    assert (tmp_path / "a.wav").exists()
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            told = "dia-fast: error: cannot write to standard output: No space left on device\n"
            assert ended(start("plan", "--gpu", "h100", stdout=full))[::2] == (1, told)


@pytest.mark.parametrize("seconds", [0.05, 0.12, 0.3, 0.6, 1.0, 1.4])
def test_ctrl_c_while_libraries_are_imported(tmp_path: Path, seconds: float) -> None:
    # From the moment that Python runs our code; before it, an interrupt is Python's own.
    code = "import sys; print(flush=True); from dia_fast.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "speak", LONG, "-q", "-o", str(tmp_path / "a.wav")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert ended(process)[::2] == (130, "dia-fast: interrupted\n")
    assert not tree(tmp_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `model` and a `codec`, recordings in `data`, and scripts in `in.jsonl`."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "model")
    make_codec(folder / "codec")
    (folder / "data").mkdir()
    for number in range(4):
        sound = np.random.default_rng(number).normal(0, 0.1, 20_000).astype(np.float32)
        Audio(sound, RATE).save(folder / "data" / f"{number}.wav")
        (folder / "data" / f"{number}.txt").write_text(TEXT)
    lines = [{"id": f"i{number}", "text": TEXT} for number in range(300)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _visible(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if ".dia-fast-" in path.name]


def test_signals_at_any_moment_leave_nothing_half_written(home: Path, tmp_path: Path) -> None:
    """One process that forks for each kill, as imports take longest; the moments are spread over the writing."""
    out = str(tmp_path / "out")
    model = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu", "-q"]
    short = [*model, "--max-new-tokens", "40"]
    doors = {
        "speak": ["speak", TEXT, *short, "-o", str(tmp_path / "a.ogg")],
        "stream": ["speak", TEXT, *model, "--stream", "--chunk-seconds", "0.05", "-o", str(tmp_path / "a.flac")],
        "batch": ["batch", str(home / "in.jsonl"), out, *short],
        "convert": ["convert", str(home / "model"), out, "--to", "original", "--pickle"],
        "train": ["train", str(home / "data"), *model, "-o", out, "--codes", str(tmp_path / "codes"), "--steps", "40"],
        "plan": ["plan", "--gpu", "h100", "--plots", out],
    }
    found = subprocess.run(
        [sys.executable, "-c", KILLING, str(tmp_path), json.dumps(doors)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    runs = json.loads(found.stdout.splitlines()[-1])
    for door, number, status, left in runs:
        assert status in (0, -number, 130) and not left, (door, number, status, left, found.stderr)
    for door in doors:
        assert any(status for name, _, status, _ in runs if name == door), f"{door} was never hit"


# Kills commands at moments in which they write. They stop themselves when they have made their first temporary folder,
# so that no processor is too busy for the first kill, with no wait, to come in time.
KILLING = """
import io, json, os, shutil, signal, sys, time
from pathlib import Path
from dia_fast.cli import main
import torch, matplotlib.figure, dia_fast.api, dia_fast.jobs.runner, dia_fast.checkpoint.saving, dia_fast.training
import dia_fast.diagnostics.roofline.plots
torch.set_num_threads(1)
folder, runs, mkdir = Path(sys.argv[1]), [], os.mkdir
def left():
    return [str(path) for path in folder.rglob("*") if ".part" in path.name]
def stopping(path, *args, **named):
    mkdir(path, *args, **named)
    if ".part" in str(path):
        os.mkdir = mkdir
        os.kill(os.getpid(), signal.SIGSTOP)
for door, command in json.loads(sys.argv[2]).items():
    for number, wait in ((signal.SIGTERM, 0), (signal.SIGINT, 0.002), (signal.SIGTERM, 0.02), (signal.SIGINT, 0.05)):
        child = os.fork()
        if not child:
            sys.stdout, os.mkdir = io.StringIO(), stopping
            os._exit(main(command))
        os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if wait:
            os.kill(child, signal.SIGCONT)
            time.sleep(wait)
        os.kill(child, number)
        os.kill(child, signal.SIGCONT)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        runs.append((door, int(number), status, left()))
        if (folder / "out").exists():
            shutil.rmtree(folder / "out")
print(json.dumps(runs))
"""


def test_a_batch_leaves_alone_what_a_stream_is_writing_into_its_folder(home: Path, tmp_path: Path) -> None:
    model = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu", "-q"]
    out = tmp_path / "out"
    out.mkdir()
    stopped = "import os, signal, sys; from dia_fast.utils.files import replacing\nwith replacing(sys.argv[1]) as t:"
    stopped += " t.write_bytes(b'whole'); os.kill(os.getpid(), signal.SIGSTOP)"
    process = subprocess.Popen([sys.executable, "-c", stopped, str(out / "x.flac")], cwd=ROOT)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    assert main(["batch", str(tmp_path / "in.jsonl"), str(out), *model, "--max-new-tokens", "30"]) == 0
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 0 and (out / "x.flac").read_bytes() == b"whole"
    assert sorted(path.name for path in out.iterdir()) == ["00001.wav", "manifest.jsonl", "x.flac"]


@pytest.mark.parametrize("special", ["pipe", "/dev/zero"])
def test_only_regular_files_are_read_at_every_door(
    home: Path, tmp_path: Path, special: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / special)
    if special == "pipe":
        os.mkfifo(path)
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT, "prompt": path}) + "\n")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": TEXT, "audio": path}) + "\n")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(path if name == "config.json" else home / "model" / name)
    out = str(tmp_path / "out")
    model = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu"]
    began = time.monotonic()
    for command in (
        ["speak", "--file", path, "-o", f"{out}.wav"],
        ["speak", TEXT, "--prompt", path, "--prompt-text", TEXT, *model, "-o", f"{out}.wav"],
        ["speak", TEXT, "--model", str(tmp_path / "model"), "-o", f"{out}.wav"],
        ["batch", path, out, "--dry-run"],
        ["batch", str(tmp_path / "in.jsonl"), out, "--dry-run"],
        ["batch", str(tmp_path / "in.jsonl"), out, *model],
        ["plan", "--gpu", f"{path}"],
        ["train", path, *model, "-o", out],
        ["train", str(tmp_path / "train.jsonl"), *model, "-o", out],
        ["info", path],
        ["info", str(tmp_path / "model")],
        ["convert", path, out, "--to", "original"],
    ):
        capfd.readouterr()
        assert main(command) in (1, 2), command
        told = capfd.readouterr().err
        assert told.startswith("dia-fast: ") and "(--debug" not in told and len(told) < 600, (command, told)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "foreign", [b"my notes", b'{"name": "mine"}', b'{"line": 3}', b'{"line": 3, "id": "a"}', b"[1]", b"12", b"x\n"]
)
def test_a_foreign_manifest_is_never_overwritten(home: Path, tmp_path: Path, foreign: bytes) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_bytes(foreign)
    with pytest.raises(InputError, match="line 1: not a line of a manifest; move the file away"):
        Batch(read_items(tmp_path / "in.jsonl", Defaults(SamplingParams(seed=1))), out)
    assert (out / "manifest.jsonl").read_bytes() == foreign


def test_a_manifest_torn_at_any_byte_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    items = read_items(tmp_path / "in.jsonl", Defaults(SamplingParams(seed=1)))
    line = json.dumps({"line": 12, "id": "a\u20ac", "status": "failed", "error": "no"}, ensure_ascii=False).encode()
    for end in range(len(line) + 1):
        (tmp_path / "manifest.jsonl").write_bytes(line + b"\n" + line[:end])
        Batch(items, tmp_path)


def test_a_batch_inside_the_folder_of_its_model_is_resumed(home: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(home / "model", tmp_path / "model")
    shutil.copytree(home / "codec", tmp_path / "model" / "codec")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    model = tmp_path / "model"
    for out in (model / "out", model):
        command = ["batch", str(tmp_path / "in.jsonl"), str(out), "--model", str(model), "--device", "cpu", "-q"]
        before = identity_of(model)
        assert main([*command, "--max-new-tokens", "30"]) == 0
        assert identity_of(model) == before
        changed = (out / "00001.wav").stat().st_mtime_ns
        assert main([*command, "--max-new-tokens", "30"]) == 0
        assert (out / "00001.wav").stat().st_mtime_ns == changed
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert identity_of(model) != before


@pytest.mark.parametrize(
    ("name", "format", "subtype", "rate"),
    [
        ("a.wav", "WAV", "PCM_16", RATE),
        ("a.aiff", "AIFF", "PCM_16", RATE),
        ("a.ogg", "OGG", "VORBIS", RATE),
        ("a.opus", "OGG", "OPUS", 48_000),
        ("a.mp3", "MP3", "MPEG_LAYER_III", RATE),
        ("a.flac", "FLAC", "PCM_16", RATE),
    ],
)
def test_recordings_that_are_cut_off_are_told(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, name: str, format: str, subtype: str, rate: int
) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)
    path = tmp_path / name
    soundfile.write(path, sound, rate, subtype, format=format)
    load_audio(path, RATE)
    assert not recwarn.list, "a whole file is not cut off"
    whole = path.read_bytes()
    for share in (0.97, 0.7, 0.5):
        path.write_bytes(whole[: int(len(whole) * share)])
        recwarn.clear()
        warnings.simplefilter("always")
        if format == "FLAC":
            with pytest.raises(InputError, match="not audio, or damaged"):
                load_audio(path, RATE)
            continue
        samples = load_audio(path, RATE)
        [warning] = recwarn.list
        assert warning.category is AudioWarning and f"{name}: the file is cut off: " in str(warning.message)
        assert f"the {len(samples) / RATE:.2f} s that are left are used" in str(warning.message)
    if format == "WAV":  # what programs write that do not know the length, and ours
        for unknown in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"):
            path.write_bytes(whole[:40] + unknown + whole[44:])
            recwarn.clear()
            load_audio(path, RATE)
            assert not recwarn.list


def test_an_mp3_without_a_header_of_its_length(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    whole = Audio(sound, RATE).to_bytes("mp3")
    frames = whole[whole.index(b"\xff", 200) :]  # after the frame that tells the length
    (tmp_path / "a.mp3").write_bytes(frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(tmp_path / "a.mp3", RATE)
    (tmp_path / "a.mp3").write_bytes(frames[:-100])
    with pytest.warns(AudioWarning, match="it ends within a frame"):
        load_audio(tmp_path / "a.mp3", RATE)


def _train(home: Path, out: Path, *options: str) -> int:
    model = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu", "-q"]
    return main(["train", str(home / "data"), *model, "-o", str(out), "--codes", str(out.parent / "codes"), *options])


def test_divergence_in_the_last_step_is_no_success(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _train(home, out, "--steps", "1", "--learning-rate", "1e30", "--warmup", "0", "--eval-share", "0") == 1
    assert "training diverged at step 1: " in capfd.readouterr().err
    assert not (out / "model").exists() and not list((out / "states").iterdir())


def test_a_full_disk_in_training_is_told_by_the_file_that_was_too_large(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        assert _train(home, out, "--steps", "1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "states/step-00000001.pt: File too large" in capfd.readouterr().err
    assert not _visible(tmp_path)


@pytest.mark.parametrize("door", ["speak", "batch"])
def test_an_interrupt_that_a_library_turns_into_another_error_is_one(
    home: Path, tmp_path: Path, door: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch does: its constructors in C take the exception for "no sequence", and raise what follows from that."""
    save, calls = Audio.save, []

    def swallowing(audio: Audio, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")
        save(audio, *args)

    monkeypatch.setattr(Audio, "save", swallowing)
    model = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu"]
    short = [*model, "--max-new-tokens", "40"]
    command = ["speak", TEXT, "-o", str(tmp_path / "a.wav"), *short]
    if door == "batch":
        command = ["batch", str(home / "in.jsonl"), str(tmp_path / "out"), *short]
    assert main(command) == 130 and calls == [1]
    assert "interrupted" in capsys.readouterr().err
    if door == "batch":
        entries = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
        assert all(json.loads(line)["status"] == "failed" for line in entries)
