"""Paths of the command line: every argument that takes one refuses what the system cannot look up, in one line."""

import argparse
import os
from pathlib import Path

import pytest

from dia_fast.cli import app, main, paths
from tests.helpers.front import tree

# Arguments of free text, which name no file.
NO_PATHS = {
    "speak": {"text", "prompt_text", "memory", "revision", "device", "dtype", "backend", "format", "split"},
    "batch": {"ray", "memory", "revision", "device", "dtype", "backend", "format", "split"},
    "serve": {"ray", "memory", "revision", "device", "dtype", "backend", "served_name", "preload", "host", "api_key"}
    | {"cors_origin", "allowed_host", "max_body", "log_format"},
    "train": {"device", "dtype", "backend"},
    "info": {"revision", "dtype"},
    "plan": {"revision", "device", "dtype"},
    "convert": {"to", "dtype", "revision"},
    "doctor": {"device", "dtype", "targets", "revision"},
    "voices": {"action", "name", "text"},
}
PRECISION = {"weights", "codec_dtype"}  # 8, 16 or 32 bit
# What a command needs before it looks at the rest.
NEEDED = {"train": ["data", "--output", "out"], "convert": ["source", "new", "--to", "original"], "info": ["model"]}
NEEDED |= {"speak": ["Hello."], "batch": ["in.jsonl", "out"], "voices": ["add", "name", "recording"]}
BAD = {
    "too long": ("x" * 300, "File name too long"),
    "null character": ("a\0b", "null character"),
    "empty": ("", "must be a path, not ''"),
    "behind a file": ("~/secret/x", "Permission denied"),
}


def commands() -> dict[str, argparse.ArgumentParser]:
    [action] = [a for a in app.build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def arguments() -> list[tuple[str, argparse.Action]]:
    return [(name, a) for name, parser in commands().items() for a in parser._actions if a.type is paths.path]


def test_every_argument_of_text_is_a_path_or_known_to_be_none() -> None:
    for name, parser in commands().items():
        texts = {a.dest for a in parser._actions if a.type is None and a.nargs != 0}
        assert texts == (NO_PATHS[name] | PRECISION) & {a.dest for a in parser._actions}, name
    assert len(arguments()) >= 20


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("command", "action"), arguments(), ids=lambda value: getattr(value, "dest", value))
def test_it_is_refused(
    command: str,
    action: argparse.Action,
    bad: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    value, message = BAD[bad]
    if bad == "behind a file":  # permissions mean nothing to root
        stat = os.stat

        def refuse(path: object, *rest: object, **named: object) -> os.stat_result:
            if str(path) == str(tmp_path / "secret" / "x"):
                raise PermissionError(13, "Permission denied")
            return stat(path, *rest, **named)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(os, "stat", refuse)
    needed = list(NEEDED.get(command, []))
    if action.option_strings:
        words, name = [*needed, action.option_strings[-1], value], action.option_strings[-1]
    else:
        places = [a.dest for a in commands()[command]._actions if not a.option_strings]
        position = places.index(action.dest)
        words, name = [*needed[:position], value, *needed[position + 1 :]], str(action.metavar)
    before = tree(tmp_path)
    assert main([command, *words]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"dia-fast: error: {name}") and message in line
    assert tree(tmp_path) == before


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `--option=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = commands()["speak"]
    args = parser.parse_args(["Hello.", "--output=~/out.wav", "--prompt=./~/x", "--file=-"])
    paths.check(parser, args)
    assert (args.output, args.prompt, args.file) == (str(tmp_path / "out.wav"), "./~/x", "-")


def test_a_table_that_cannot_be_read_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`DIA_KERNELS_TABLE` is a path, too. A pipe of that name is not waited for."""
    monkeypatch.setattr("dia_kernels.ops.triton_obstacle", lambda device: None)
    words = ["speak", "[S1] Hello.", "--device", "cpu", "--backend", "triton", "-o", str(tmp_path / "x.wav"), "-q"]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "deep").write_text("[" * 200_000)
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, message in {
        "none": "No such file", "pipe": "not a regular file", "deep": "not JSON", "list": "expected {op",
        "bytes": "not JSON", ".": "Is a directory",
    }.items():  # fmt: skip
        monkeypatch.setenv("DIA_KERNELS_TABLE", str(tmp_path / name))
        assert main(words) == 2, name
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("dia-fast: error: ") and message in line, line
