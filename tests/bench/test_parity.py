"""Parity of the model on a GPU with torch, without a GPU: what it finds, and that nothing found is lost."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import parity
from bench.parity import Finding
from bench.tools import results
from bench.tools.tiny_models import tiny_config
from dia_fast.model.config import DiaConfig
from dia_fast.model.model import DiaModel
from dia_kernels import reference


class BrokenOps:
    """The reference, but one op adds a little."""

    def __getattr__(self, op: str) -> Any:
        if op != "linear_residual":
            return getattr(reference, op)
        return lambda x, weight, residual, *more: reference.linear_residual(x, weight, residual, *more).add_(0.05)


def small_config() -> DiaConfig:
    codes = {"num_channels": 3, "vocab_size": 70, "eos_token_id": 64, "pad_token_id": 65, "bos_token_id": 66}
    layer = {"num_hidden_layers": 1}
    return tiny_config(layer, layer | codes | {"max_position_embeddings": 64}, delay_pattern=(0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_finds_a_broken_kernel_and_nothing_else(dtype: torch.dtype) -> None:
    config = small_config()
    outcomes = {}
    for name, ops in (("sound", reference), ("broken", BrokenOps())):
        found = parity.check(config, dtype, ops, torch.device("cpu"), 9)  # type: ignore[arg-type]
        outcomes[name] = {finding.what: finding.outcome for finding in found}
    checks = ["greedy tokens", "sampled tokens", "transformers"] if dtype == torch.float32 else ["logits"]
    assert outcomes["sound"] == {"graphs": "unchecked", **dict.fromkeys(checks, "ok")}
    assert outcomes["broken"] == {"graphs": "unchecked", **dict.fromkeys(checks, "wrong")}


class NoOps:
    """Every op raises."""

    def __getattr__(self, op: str) -> None:
        raise RuntimeError(f"{op}: out of registers")


def test_parity_reports_what_raises() -> None:
    [finding] = parity.check(tiny_config(), torch.float16, NoOps(), torch.device("cpu"), 4)  # type: ignore[arg-type]
    assert finding.outcome == "failed" and "out of registers" in finding.detail


class NoSampling:
    """The reference without `sample`, which only whole runs need."""

    def __getattr__(self, op: str) -> Any:
        if op == "sample":
            raise RuntimeError("sample: out of registers")
        return getattr(reference, op)


def test_a_check_that_raises_leaves_the_others_their_findings() -> None:
    found = parity.check(small_config(), torch.float32, NoSampling(), torch.device("cpu"), 5)  # type: ignore[arg-type]
    outcomes = {finding.what: finding.outcome for finding in found}
    failed = dict.fromkeys(["greedy tokens", "sampled tokens", "transformers"], "failed")
    assert outcomes == {"graphs": "unchecked", **failed}


def test_a_failure_of_transformers_is_not_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise ImportError("transformers: another version is needed\nand much more")

    monkeypatch.setattr("bench.tools.pairs.theirs_sharing", fail)
    found = list(parity.check(small_config(), torch.float32, reference, torch.device("cpu"), 5))
    assert [finding.outcome for finding in found] == ["unchecked", "ok", "ok", "unchecked"]
    assert found[-1].detail.endswith("ImportError: transformers: another version is needed")


def test_what_was_found_is_written_before_the_next_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that hangs is ended from outside: the report then knows of what was wrong before."""
    file = tmp_path / "parity.json"

    def check(*given: Any) -> Iterator[Finding]:
        yield Finding("float32", "graphs", "wrong", "other codes")
        [found] = results.flat(results.read(file))
        assert found["outcome"] == "wrong"
        yield Finding("float32", "greedy tokens", "ok", "none differ")

    monkeypatch.setattr(parity, "check", check)
    arguments = ["--device", "cpu", "--backend", "torch", "--dtypes", "fp32", "--json", str(file)]
    assert parity.main(arguments) == 1 and len(results.read(file)["results"]) == 2


def model_of(config: DiaConfig) -> DiaModel:
    return DiaModel(config, reference).load(parity.weights_for(config, torch.float32, torch.device("cpu")))


def test_graphs_that_could_not_be_captured_are_not_called_right() -> None:
    """The engine warns and goes on launch by launch."""

    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = model_of(small_config())
    assert parity.check_graphs(model, 5, lambda step: step) == ("ok", "the same codes")
    with pytest.raises(RuntimeError, match="could not be captured as a graph .*operation not permitted"):
        parity.check_graphs(model, 5, refuse)
