"""`--threads`: said, or by the size of the model, and never changed behind the caller's back."""

from collections.abc import Iterator

import pytest
import torch

from dia_fast.cli import main
from dia_fast.cli.app import build_parser
from dia_fast.cli.speak import SMALL_MODEL, set_threads


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Some count that nobody would choose."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_a_small_model_gets_one_thread(threads: int) -> None:
    set_threads(None, SMALL_MODEL)
    assert torch.get_num_threads() == threads
    set_threads(None, SMALL_MODEL - 1)
    assert torch.get_num_threads() == 1


def test_what_is_said_counts(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads(2, 1)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_threads(None, 1)
    assert torch.get_num_threads() == 2, "the environment had its say when torch began"


@pytest.mark.parametrize("command", ["speak", "batch", "serve", "train"])
def test_every_command_that_computes_takes_it(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    needed = {"speak": ["Hello."], "batch": ["in", "out"], "serve": [], "train": ["data", "-o", "out"]}[command]
    args = build_parser().parse_args([command, *needed, "--threads", "7"])
    assert args.threads == 7
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--threads N" in capfd.readouterr().out


def test_none_is_no_number(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "none", "-o", "none/out", "--model", "demo", "--threads", "0"]
    assert main(words) == 2
    assert "--threads must be at least 1, not 0" in capfd.readouterr().err
