"""Common to every test: few threads, no network, the same random numbers in every run."""

import builtins
import os
import signal
import sys

# Before torch is imported: the suite runs in several processes, and tiny tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell lets what it runs in the background ignore Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports Triton, which tests of the integrations do while they are collected.
from tests.kernels import executor

executor.choose()

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

# Time per example says nothing on a shared machine; pytest-timeout guards against hangs.
hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Seeds torch, so that a test draws the same numbers alone and within the suite."""
    import torch

    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    """Fails a test that leaves `dia` imported, or ours in its place: the next to ask for that name would find it."""
    before = _original()
    yield
    left = _original()
    for name in left.keys() - before.keys():
        del sys.modules[name]
    assert left == before, f"left in sys.modules: {left}; before: {before}"


def _original() -> dict[str, Any]:
    return {name: module for name, module in list(sys.modules.items()) if name.split(".")[0] == "dia"}


@pytest.fixture(autouse=True, scope="session")
def _own_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Saved voices go to a folder of this run, not to the user's."""
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is not installed: importing it, or anything of it, fails."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
