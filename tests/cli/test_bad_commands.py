"""Checkpoints and commands that cannot work: refused in words that help, with nothing left behind."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dia_fast import CheckpointError, Dia
from dia_fast.cli import main
from tests.helpers.front import TEXT, make_codec, make_model, refused, tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `model` and a `codec`."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("bad")
    make_model(folder / "model")
    make_codec(folder / "codec")
    return folder


def configured(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def weighed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


class Malice:
    """A pickle that would leave a file behind if it were run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("I was here",)


def malicious(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"decoder.norm.weight": Malice()}, folder / "pytorch_model.bin")


def malicious_and_old(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malice()}))


def misshapen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.decoder.norm.weight"] = torch.ones(31)


NORM = "model.decoder.norm.weight"
SPOILT: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no folder", shutil.rmtree, "spoilt: no such file or folder, and not the id of a Hub repository"),
    ("no config", lambda f: (f / "config.json").unlink(), "has no config.json"),
    ("config is no JSON", lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), "expected an object of named fields"),
    ("unknown field", configured(lambda c: c["decoder_config"].update(window=512)), "decoder_config.window = 512"),
    (
        "unknown field of the decoder",
        configured(lambda c: c["decoder_config"].update(num_experts=8)),
        "unknown field decoder_config.num_experts = 8",
    ),
    (
        "field of a wrong type",
        configured(lambda c: c["decoder_config"].update(hidden_size="32")),
        "decoder_config.hidden_size must be an integer of at least 1, got '32'",
    ),
    (
        "negative size",
        configured(lambda c: c["encoder_config"].update(num_hidden_layers=-1)),
        "encoder_config.num_hidden_layers must be an integer of at least 1, got -1",
    ),
    ("another model", configured(lambda c: c.update(model_type="llama")), "model_type is 'llama'; only 'dia'"),
    ("late first channel", configured(lambda c: c.update(delay_pattern=[1] * 9)), "delay_pattern starts with 1"),
    ("another size", configured(lambda c: c["decoder_config"].update(hidden_size=64)), "has shape"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    ("empty weights", lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is truncated"),
    ("truncated weights", truncated, "model.safetensors is truncated: tensor"),
    ("text for weights", lambda f: (f / "model.safetensors").write_text("hello" * 9), "not a safetensors file"),
    ("missing tensor", weighed(lambda t: t.pop(NORM)), f"tensor {NORM} is missing"),
    ("extra tensor", weighed(lambda t: t.update(spare=torch.ones(2))), "tensor spare is not part of the model"),
    ("wrong shape", weighed(misshapen), f"tensor {NORM} has shape [31], but config.json asks for [32]"),
    ("wrong dtype", weighed(lambda t: t.update({NORM: torch.ones(32).long()})), f"tensor {NORM} has dtype int64"),
    ("pickle that runs code", malicious, "(posix.mkdir) and could run code when it is loaded"),
    ("old pickle that runs code", malicious_and_old, "is refused: it is damaged, or a bare pickle"),
]


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in SPOILT], ids=[case[0] for case in SPOILT])
def test_checkpoint(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(home / "model", tmp_path / "spoilt"))
    spoil(folder)
    with refused(CheckpointError, message, tmp_path):
        Dia.from_pretrained(folder, codec=None, device="cpu")


COMMANDS: list[tuple[str, list[str], str]] = [
    ("no text", ["speak"], "text is empty"),
    ("two texts", ["speak", TEXT, "--file", "text.txt"], "both TEXT and --file are given"),
    ("missing file", ["speak", "--file", "none.txt"], "cannot read the text file none.txt: No such file or directory"),
    ("folder for a file", ["speak", "--file", "folder"], "cannot read the text file folder: Is a directory"),
    ("endless file", ["speak", "--file", "/dev/zero"], "cannot read the text file /dev/zero: not a regular file"),
    ("Latin-1 file", ["speak", "--file", "latin1.txt"], "text is not valid UTF-8: byte 0xe9 at offset 8"),
    ("no model", ["batch", "text.txt", "out"], "no model: name one with --model, as in --model nari-labs/Dia-1.6B"),
    ("missing model", ["speak", TEXT, "--model", "./none"], "./none: no such file or folder"),
    ("words without a voice", ["speak", TEXT, "--prompt-text", TEXT], "--prompt-text needs --prompt"),
    (
        "missing voice",
        ["speak", TEXT, "--prompt", "no.wav", "--prompt-text", TEXT],
        "--prompt 'no.wav': no such recording",
    ),
    ("empty transcript", ["speak", TEXT, "--prompt", "text.txt", "--prompt-text", ""], "text is empty"),
    ("no voice", ["speak", TEXT, "--model", "MODEL", "--prompt", "text.txt", "--prompt-text", TEXT], "not audio"),
    ("missing output folder", ["speak", TEXT, "-o", "none/out.wav"], "none does not exist; create it first"),
    ("output is a folder", ["speak", TEXT, "-o", "folder.wav"], "cannot write folder.wav: it is a folder"),
    ("unknown extension", ["speak", TEXT, "-o", "out.aac"], "its extension must be one of .wav, .flac, .ogg, .mp3"),
    ("no extension", ["speak", TEXT, "-o", "/dev/full"], "its extension must be one of .wav"),
    ("NaN temperature", ["speak", TEXT, "--temperature", "nan"], "temperature must be from 0 (greedy) to 100, not nan"),
    ("top_k 0", ["speak", TEXT, "--top-k", "0"], "--top-k must be from 1"),
    ("negative seed", ["speak", TEXT, "--seed", "-2"], "seed must be from -1"),
    ("negative length", ["speak", TEXT, "--max-new-tokens", "-5"], "--max-new-tokens must be at least 1, not -5"),
    ("short", ["speak", TEXT, "--model", "MODEL", "--max-new-tokens", "9"], "--max-new-tokens must be at least 17"),
    ("unknown device", ["speak", TEXT, "--model", "MODEL", "--device", "gpu"], "device 'gpu' is unknown"),
    ("unknown dtype", ["speak", TEXT, "--model", "MODEL", "--dtype", "fp8"], "dtype 'fp8' is not supported"),
    ("unknown backend", ["speak", TEXT, "--model", "MODEL", "--backend", "jax"], "backend: 'jax' is unknown"),
    ("missing codec", ["speak", TEXT, "--model", "MODEL", "--codec", "./none"], "./none: no such file or folder"),
    ("info on nothing", ["info", "none"], "none: no such file or folder"),
    ("info offline", ["info", "owner/name", "--offline"], "owner/name is neither a local folder nor in the cache"),
    ("info on a text", ["info", "text.txt"], "has no config.json"),
    ("info for no one", ["info", "MODEL", "--batch", "0"], "--batch must be at least 1, not 0"),
    ("info too long", ["info", "MODEL", "--length", "201"], "--length must be from 1 to 200 for this model, not 201"),
    ("convert onto a folder", ["convert", "MODEL", "full", "--to", "original"], "full exists and is not an empty"),
    ("convert onto a file", ["convert", "MODEL", "text.txt", "--to", "original"], "text.txt exists"),
    ("convert to nothing", ["convert", "MODEL", "new"], "say what to write: --to transformers"),
    ("convert to 4 bits", ["convert", "MODEL", "new", "--weights", "int4"], "weights 'int4' is unknown"),
    ("convert nothing", ["convert", "none", "new", "--to", "original"], "none: no such file or folder"),
    ("convert to int8", ["convert", "MODEL", "new", "--to", "original", "--dtype", "int8"], "dtype 'int8' is not"),
    (
        "convert to a pickle",
        ["convert", "MODEL", "new", "--to", "transformers", "--pickle"],
        "only the original layout can be written as a pickle",
    ),
]


@pytest.mark.parametrize(("command", "message"), [case[1:] for case in COMMANDS], ids=[case[0] for case in COMMANDS])
def test_command(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    for name in ("folder", "folder.wav", "full"):
        (tmp_path / name).mkdir()
    for name, data in {"text.txt": b"[S1] Hi.", "latin1.txt": b"[S1] caf\xe9", "full/file": b""}.items():
        (tmp_path / name).write_bytes(data)
    command = [str(home / "model") if word == "MODEL" else word for word in command]
    if command[0] == "speak" and "--codec" not in command:
        command += ["--codec", str(home / "codec")]
    before = tree(tmp_path)
    assert main(command) == 2
    output = capfd.readouterr()
    assert output.out == ""
    last = output.err.splitlines()[-1]
    assert last.startswith("dia-fast: error: ") and message in last
    assert "Traceback" not in output.err
    assert all(line.startswith("dia-fast: warning: ") for line in output.err.splitlines()[:-1])
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [["sing"], ["speak", "a", "b"], ["speak", "--tempo", "3"], ["speak", TEXT, "--seed", " "], ["convert", "a"]],
    ids=" ".join,
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dia-fast")


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions mean nothing to root: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_output_folder(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "folder"
        folder.mkdir()
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        monkeypatch.chdir(name)  # the folder in which the tests run may be closed to that user
        with ordinary_user():
            assert main(["speak", TEXT, "--model", "unused/unused", "-o", str(folder / "out.wav")]) == 2
        assert f"cannot write {folder / 'out.wav'}: Permission denied" in capfd.readouterr().err
        assert not tree(folder)
        folder.chmod(0o755)
        monkeypatch.undo()


def test_full_disk(home: Path, tmp_path: Path) -> None:
    """The system itself breaks the write off: no file of this process may grow beyond 8 kB."""
    path = tmp_path / "out.wav"
    path.write_bytes(b"an older file")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "dia_fast", "speak", TEXT, "--model", str(home / "model"), "-o", str(path)]
    found = subprocess.run(
        [*command, "--codec", str(home / "codec"), "--device", "cpu", "--max-new-tokens", "60"],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert found.returncode == 2, found.stderr
    assert found.stderr.splitlines()[-1] == f"dia-fast: error: cannot write {path}: File too large"
    assert tree(tmp_path) == {"out.wav": b"an older file"}
