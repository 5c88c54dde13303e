"""`bench.cpu_ratios` and `bench.resident_memory`: what is judged, and that both run on a small model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cpu_ratios, resident_memory
from bench.measure import Seconds
from bench.tools.tiny_models import make_transformers_checkpoint, tiny_config
from dia_fast.model.cpu_weights import TABLE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ratios") / "model"
    make_transformers_checkpoint(folder, tiny_config(), dtype=torch.bfloat16)
    return str(folder)


def test_every_instruction_set_with_products_of_its_own_has_bars() -> None:
    assert set(cpu_ratios.BARS) == set(TABLE) - {"other"}
    for isa in cpu_ratios.BARS:
        assert all(cpu_ratios.bar(isa, "float", requests) >= 1 for requests in (1, 2, 8, 32))
        assert (cpu_ratios.bar(isa, "int8", 1), cpu_ratios.bar(isa, "int8", 8)) == (1.9, 1.8)
    assert cpu_ratios.bar("avx2", "float", 1) == 1.7
    assert cpu_ratios.bar("other", "float", 1) is None is cpu_ratios.bar("amx", "int8-mlp", 1)


@pytest.mark.parametrize(("times", "status"), [(1.0, 1), (1.95, 0)])
def test_a_ratio_below_its_bar_fails(
    times: float, status: int, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"transformers": Seconds(times, 9.0), "float": Seconds(1.0, 9.0), "int8": Seconds(1.0, 9.0)}
    monkeypatch.setattr(cpu_ratios, "instruction_set", lambda: "avx512_bf16")
    monkeypatch.setattr(cpu_ratios, "measure", lambda *_: dict(found))
    assert cpu_ratios.main(["--model", model, "--requests", "1", "8"]) == status
    said = capsys.readouterr().out
    assert ("below its bar: 1 requests, int8: 1.00, the bar is 1.9" in said) == bool(status)
    assert "1 requests, float" not in said


def test_all_sides_make_the_steps_on_the_same_weights(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    given = [
        "--model",
        model,
        "--text",
        "9",
        "--requests",
        "1",
        "2",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--json",
        str(out),
    ]
    assert cpu_ratios.main(given) in (0, 1)  # what is so small may be slower
    rows = json.loads(out.read_text())["results"]
    assert [(row["case"]["requests"], row["case"]["weights"]) for row in rows] == [
        (1, "float"), (1, "int8"), (2, "float"), (2, "int8"),
    ]  # fmt: skip
    for row in rows:
        values: dict[str, Any] = row["values"]
        assert values["wall_ratio"] == pytest.approx(values["transformers_wall_ms"] / values["wall_ms"])


def test_memory_is_that_of_a_process_of_its_own(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc, which Linux has")
    found = resident_memory.measure(model, "int8", "bfloat16", 3)
    assert found["steps"] >= 3
    assert 5e7 < found["imported_bytes"] <= found["loaded_bytes"] <= found["peak_bytes"]
    assert found["loading_peak_bytes"] <= found["peak_bytes"]
    assert resident_memory.main(["--model", "nowhere.safetensors"]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_model_in_8_bits_speaks_within_two_gigabytes(tmp_path: Path) -> None:
    """At the size of Dia-1.6B, with random weights on disk: 2.3 GB with all of torch."""
    out = tmp_path / "out.json"
    assert resident_memory.main(["--json", str(out)]) == 0
    [row] = json.loads(out.read_text())["results"]
    assert row["values"]["peak_bytes"] < 2.3e9, row["values"]
