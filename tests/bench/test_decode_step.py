"""The benchmark runs and reports; what it measures depends on the machine."""

from pathlib import Path

import pytest

from bench import decode_step, measure
from bench.tools.tiny_models import make_transformers_checkpoint, tiny_config


def test_both_sides_are_timed_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    folder = make_transformers_checkpoint(tmp_path / "model", config)
    arguments = ["--model", str(folder), "--dtype", "float32", "--text", "9", "--device", "cpu"]
    status = decode_step.main([*arguments, "--steps", "4", "--rounds", "2", "--against", "transformers"])
    printed = capsys.readouterr().out
    assert status in (0, 1)  # whoever was faster on so small a model
    assert "transformers " in printed and "GB/s" in printed and "times transformers'" in printed
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith(("dia-fast", "tran"))] == ["8", "8"]


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_step.main(["--model", "no/such/folder/here"]) == 2
    assert "no/such/folder/here" in capsys.readouterr().err


def test_bytes_of_a_step_of_the_full_model() -> None:
    """One decode step of Dia-1.6B in bf16 reads 2.53 GB."""
    from dia_fast.model.config import DiaConfig
    from dia_fast.model.model import DiaModel
    from dia_kernels import get_ops

    model = DiaModel(DiaConfig(), get_ops("torch")).bfloat16()
    assert measure.bytes_per_step(model) / 1e9 == pytest.approx(2.529, abs=0.001)
