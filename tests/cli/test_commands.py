"""The command line: what it writes, what it says, and the status it ends with."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.cli import main
from dia_fast.cli.info import memory_needed, readable
from dia_fast.model.config import DiaConfig
from dia_fast.utils.progress import StepBar
from tests.helpers.front import TEXT, TINY, make_codec, make_model, tree

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
def speak(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The beginning of a quick `speak` command, to be run in the folder `home`."""
    monkeypatch.chdir(home)
    return ["speak", "--model", "model", "--codec", "codec", "--device", "cpu", "--max-new-tokens", "30"]


def stdin_of(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data))


def test_speak_writes_a_file_and_says_what_it_did(
    speak: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.wav"
    assert main([*speak, TEXT, "-o", str(path), "--seed", "12"]) == 0
    samples, rate = soundfile.read(path)
    assert rate == 44_100 and samples.ndim == 1 and len(samples) % 512 == 0 and len(samples) > 0
    output = capfd.readouterr()
    assert output.out.startswith(f"{path}: {len(samples) / rate:.2f} s of sound at 44100 Hz, 31 steps in ")
    assert "steps/s" in output.out and "x realtime" in output.out and output.out.endswith("seed 12\n")
    assert "warning: speech was cut after 30 steps" in output.err
    assert "step/s" not in output.err, "a progress bar has no place in a log"
    assert list(tree(tmp_path)) == ["out.wav"]


def test_the_seed_of_the_summary_speaks_it_again(
    speak: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    assert main([*speak, TEXT, "-o", str(paths[0])]) == 0
    seed = capfd.readouterr().out.split()[-1]
    assert main([*speak, TEXT, "-o", str(paths[1]), "--seed", seed]) == 0
    assert main([*speak, TEXT, "-o", str(paths[2]), "--seed", str(int(seed) + 1)]) == 0
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again != other


@pytest.mark.parametrize(
    ("extension", "magic"), [("wav", b"RIFF"), ("flac", b"fLaC"), ("ogg", b"OggS"), ("mp3", b""), ("WAV", b"RIFF")]
)
def test_the_extension_picks_the_format(speak: list[str], tmp_path: Path, extension: str, magic: bytes) -> None:
    path = tmp_path / f"out.{extension}"
    assert main([*speak, TEXT, "-o", str(path), "-q"]) == 0
    assert path.read_bytes().startswith(magic)
    assert soundfile.info(path).samplerate == 44_100


@pytest.mark.parametrize("source", ["argument", "file", "dash", "stdin", "with BOM and newline"])
def test_the_text_comes_from_anywhere(
    speak: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    expected, path, file = tmp_path / "expected.wav", tmp_path / "out.wav", tmp_path / "text.txt"
    assert main([*speak, "[S1] Zoë. [S2] What?", "-o", str(expected), "--seed", "1", "-q"]) == 0
    data = "[S1] Zoë. [S2] What?".encode()
    if source == "with BOM and newline":
        data = b"\xef\xbb\xbf" + data + b"\r\n"
    file.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", stdin_of(data))
    words = {"argument": [data.decode()], "file": ["--file", str(file)], "dash": ["-f", "-"], "stdin": []}
    assert main([*speak, *words.get(source, ["-f", str(file)]), "-o", str(path), "--seed", "1", "-q"]) == 0
    assert path.read_bytes() == expected.read_bytes()


def test_a_voice_changes_what_is_said(speak: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    voice, path, plain = tmp_path / "voice.wav", tmp_path / "out.wav", tmp_path / "plain.wav"
    soundfile.write(voice, 0.3 * np.sin(np.arange(12_000) / 20), 48_000)
    clone = ["--prompt", str(voice), "--prompt-text", "[S1] Words."]
    assert main([*speak, "[S2] And these.", *clone, "-o", str(path), "--seed", "1", "-q"]) == 0
    assert main([*speak, "[S1] Words. [S2] And these.", "-o", str(plain), "--seed", "1", "-q"]) == 0
    assert path.read_bytes() != plain.read_bytes()
    capfd.readouterr()
    whole = [*speak, "[S1] Words. [S2] And these.", "--prompt", str(voice)]
    assert main([*whole, "-o", str(plain), "--seed", "1", "-q"]) == 0
    assert path.read_bytes() == plain.read_bytes()
    assert "must then begin with what is said in the recording" in capfd.readouterr().err


def test_sampling_options_reach_the_model(speak: list[str], tmp_path: Path) -> None:
    found = set()
    options = ["", "--guidance-scale 9", "--guidance-scale none", "--temperature 9", "--top-p 0.05", "--top-k 2"]
    for option in [*options, "--top-k none", "--greedy"]:
        assert main([*speak, TEXT, "-o", str(tmp_path / "out.wav"), "--seed", "1", "-q", *option.split()]) == 0
        found.add((tmp_path / "out.wav").read_bytes())
    assert len(found) == 8


def test_quiet_is_quiet(speak: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*speak, TEXT, "-o", str(tmp_path / "out.wav"), "-q"]) == 0
    output = capfd.readouterr()
    assert output.out == ""
    assert "step/s" not in output.err


def test_the_bar_shows_speed_and_counts(capfd: pytest.CaptureFixture[str]) -> None:
    with StepBar(3, 2.0) as bar:
        for step in range(1, 4):
            time.sleep(0.11)
            bar(step)
    assert bar.steps == 3 and 0.3 < bar.seconds < 3
    assert "3/3" in (shown := capfd.readouterr().err) and "x realtime" in shown


def test_info_tells_the_configuration_and_the_memory(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(home / "model"), "--batch", "2", "--length", "100", "--text-length", "50"]) == 0
    text = capfd.readouterr().out
    for part in ("transformers layout, float32", "1 layers, 32 wide, MLP 64, 2 heads over 1 KV heads", "2 dialogues"):
        assert part in text
    assert main(["info", str(home / "model"), "--json", "--length", "100", "--no-guidance"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["config"]["decoder"]["max_position_embeddings"] == 200
    assert facts["parameters"] == open_checkpoint(home / "model").parameters
    assert facts["bytes"] == 4 * facts["parameters"] == facts["memory"]["fp32"]["weights"]
    assert facts["memory"]["fp32"]["self_kv"] == 100 * 2 * 16 * 4
    assert facts["memory"]["bf16"]["cross_kv"] == 1024 * 2 * 2 * 16 * 2


def test_memory_of_the_real_model() -> None:
    """Against the figures that follow from the published sizes: 36,864 and 147,456 bytes per token in bf16."""
    need = memory_needed(DiaConfig(), 2, length=1, text_length=1)
    assert need == {
        "weights": 2 * 1_611_160_576,
        "self_kv": 2 * 36_864,
        "cross_kv": 147_456,
        "total": 2 * 1_611_160_576 + 2 * 36_864 + 147_456,
    }
    narrow = memory_needed(DiaConfig(), 2, length=1, text_length=1, weights="int8")
    mixed = memory_needed(DiaConfig(), 2, length=1, text_length=1, weights="int8-mlp")
    assert 0.5 < narrow["weights"] / need["weights"] < 0.52 < mixed["weights"] / need["weights"] < 0.7
    assert narrow["total"] - need["total"] == narrow["weights"] - need["weights"]
    long = memory_needed(DiaConfig(), 4, batch=3, length=100, text_length=10, guided=False)
    assert (long["self_kv"], long["cross_kv"]) == (3 * 100 * 73_728, 3 * 10 * 294_912)


def test_info_of_a_hub_model_downloads_only_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_transformers()))

    def download(repository: str, name: str, revision: str | None = None) -> str:
        assert (repository, name, revision) == ("someone/dia", "config.json", "v2")
        return str(tmp_path / name)

    def listed(self: object, repository: str, revision: str | None = None, timeout: float | None = None) -> object:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename="config.json")])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", listed)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert main(["info", "someone/dia", "--revision", "v2"]) == 0
    assert "on the Hub, not downloaded" in capfd.readouterr().out
    assert main(["info", "someone/dia", "--offline"]) == 2


def test_readable_sizes() -> None:
    sizes = (0, 999, 1000, 3_222_321_152, 2e13)
    assert [readable(size) for size in sizes] == ["0 B", "999 B", "1 kB", "3.22 GB", "20 TB"]


def test_convert_there_and_back(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there, back, small = tmp_path / "original", tmp_path / "back", tmp_path / "small"
    assert main(["convert", str(home / "model"), str(there), "--to", "original"]) == 0
    assert "written in the original layout" in capfd.readouterr().out
    assert main(["convert", str(there), str(back), "--to", "transformers"]) == 0
    assert open_checkpoint(there).layout == "original"
    expected, found = open_checkpoint(home / "model").load(), open_checkpoint(back).load()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert main(["convert", str(there), str(small), "--to", "transformers", "--dtype", "bf16"]) == 0
    assert open_checkpoint(small).dtype == torch.bfloat16


@pytest.mark.parametrize("command", [[], ["speak"], ["info"], ["convert"]])
def test_help_teaches_with_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "dia-fast " + " ".join(command) in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_module_runs_and_tells_its_version() -> None:
    command = [sys.executable, "-m", "dia_fast", "--version"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.startswith("dia-fast ") and f"torch {torch.__version__.split('+')[0]}" in found.stdout
    assert main([]) == 2


def test_unexpected_errors_are_one_line_and_debug_shows_them(
    speak: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("a bug\nover two lines")

    monkeypatch.setattr("dia_fast.engine.Engine.submit", fail)
    command = [*speak, TEXT, "-o", str(tmp_path / "out.wav")]
    assert main(command) == 1
    assert capfd.readouterr().err == "dia-fast: error: ZeroDivisionError: a bug over two lines (--debug shows where)\n"
    with pytest.raises(ZeroDivisionError):
        main([*command, "--debug"])
    assert not tree(tmp_path)


def test_ctrl_c_ends_with_130_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    """A real signal in the middle of the work, in a process of its own."""
    code = (
        "import os, signal, sys\n"
        "from dia_fast.engine import Engine\n"
        "from dia_fast.cli import main\n"
        "real = Engine.step\n"
        "def interrupted(engine):\n"
        f"    if engine.steps == 5: os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "    return real(engine)\n"
        "Engine.step = interrupted\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["speak", TEXT, "--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    found = subprocess.run(
        [sys.executable, "-c", code, *command, "-o", str(tmp_path / "out.wav")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert found.returncode == 130, found.stderr
    assert found.stderr == "dia-fast: interrupted\n"
    assert not tree(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(
    speak: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.wav"
    path.write_bytes(b"old")

    def interrupt(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    assert main([*speak, TEXT, "-o", str(path)]) == 130
    assert tree(tmp_path) == {"out.wav": b"old"}


def test_a_reader_that_went_away_is_no_error(home: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "dia_fast", "info", str(home / "model")]
    for buffered in (False, True):
        environment |= {"PYTHONUNBUFFERED": "" if buffered else "1"}
        read, write = os.pipe()
        os.close(read)
        found = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
        os.close(write)
        assert (found.returncode, found.stderr) == (0, b"")
