"""Choice of the GPU by benchmarks, and the benchmark of the original package, without either."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import environment, latency, measure, original, parity, throughput
from bench.device import Device
from bench.measure import Seconds
from dia_fast.diagnostics.doctor import random_model
from dia_fast.errors import CheckpointError
from dia_fast.text.tokenizer import encode_text
from dia_kernels import reference
from tests.helpers.front import TINY


def test_a_step_of_the_original_is_told_without_what_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def call(steps: int) -> None:
        clock[0] += 7.0 + 2.0 * steps

    monkeypatch.setattr(original, "now", lambda: Seconds(clock[0], clock[0] / 2))
    assert original.original_steps(call, 10) == Seconds(2.0, 1.0)


def test_the_original_package_is_asked_for_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(original, "installed", lambda package: False)
    assert original.main(["--model", "none"]) == 2
    assert "the original package is not installed: pip install" in capsys.readouterr().err


def test_the_original_is_spoken_of_with_the_text_it_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(TINY, reference, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(original, "load_original", lambda options: SimpleNamespace(generate=lambda *a, **more: None))
    monkeypatch.setattr(original, "load", lambda options: (model, None))
    assert original.main(["--model", "none", "--device", "cpu", "--steps", "2", "--rounds", "1"]) in (0, 1)
    assert f"{len(encode_text(original.TEXT))} bytes of text" in capsys.readouterr().out


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPUs that are made the current one, on a machine that seems to have two."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    return current


def test_work_goes_to_the_gpu_that_was_named(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeps, graphs and launches go to the current GPU, whatever tensors they are given."""
    assert [measure.use(torch.device(name)).type for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda"]
    assert two_gpus == [1]
    assert Device(torch.device("cuda:1")).gpu and two_gpus == [1, 1]
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    monkeypatch.setattr(parity, "get_ops", lambda backend, device: reference)
    monkeypatch.setattr(parity, "check", lambda *given: iter(()))
    assert parity.main(["--device", "cuda:1", "--dtypes", "fp32"]) == 0 and two_gpus == [1, 1, 1]
    with pytest.raises(CheckpointError):
        measure.load(argparse.Namespace(device="cuda:0", model="none", dtype="float32"))
    assert two_gpus == [1, 1, 1, 0]


def test_the_driver_is_asked_about_the_card_that_torch_uses(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts what CUDA_VISIBLE_DEVICES leaves, nvidia-smi counts all cards."""
    card = SimpleNamespace(
        name="a card", total_memory=1 << 34, multi_processor_count=7, major=9, minor=0, L2_cache_size=1, uuid="12ab-34"
    )
    asked: list[str] = []

    def smi(command: list[str], **options: Any) -> Any:
        asked.extend(command)
        return SimpleNamespace(stdout="550.1, 1980 MHz, 2619 MHz, 700 W\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card.name)
    monkeypatch.setattr(environment.subprocess, "run", smi)
    facts = environment.collect(torch.device("cuda:1"))
    assert "--id=GPU-12ab-34" in asked and facts["driver_version"] == "550.1" and "12ab" not in str(facts)


def test_a_device_that_is_none_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (throughput, latency):
        assert command.main(["--model", "none", "--device", "gpu"]) == 2
        assert "device 'gpu' is unknown; use 'cpu', 'cuda', 'cuda:1'" in capsys.readouterr().err


def test_pictures_that_cannot_be_drawn_are_refused_before_anything_is_measured(
    without_matplotlib: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main(["--model", "none", "--out", str(tmp_path)]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err
