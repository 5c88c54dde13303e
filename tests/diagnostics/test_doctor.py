"""`dia-fast doctor`: what it says of sound kernels, of wrong ones, and of machines that cannot run any."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.diagnostics import doctor
from dia_kernels import reference
from dia_kernels.reference.quantized import Int8Weight
from tests.helpers.front import make_codec, make_model

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: in this one Triton may be interpreted already."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "dia_fast", "doctor", "--device", "cpu", *options],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )


def kernels(**broken: object) -> SimpleNamespace:
    """The reference in the role of the kernels, some ops replaced."""
    return SimpleNamespace(**{name: getattr(reference, name) for name in reference.__all__} | broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_kernels_are_all_found_sound(dtype: torch.dtype) -> None:
    verdicts = doctor.check_running(kernels(), dtype, CPU, full_width=False)
    assert [verdict.op for verdict in verdicts] == [
        *doctor.OPS,
        *(f"{op} x int8" for op in doctor.OPS if op in doctor.PROJECTIONS),
    ]
    assert {verdict.outcome for verdict in verdicts} == {"ok"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["rms_norm_glu", "rope_attention", "snake_residual"])
def test_a_kernel_that_computes_something_else_is_named(op: str, dtype: torch.dtype) -> None:
    def slightly_off(*args: torch.Tensor, **named: bool) -> torch.Tensor:
        out = getattr(reference, op)(*args, **named)
        return out.mul_(1.05)

    verdicts = doctor.check_running(kernels(**{op: slightly_off}), dtype, CPU, full_width=False)
    expected = {op, f"{op} x int8"} if op in doctor.PROJECTIONS else {op}
    assert {verdict.op for verdict in verdicts if verdict.outcome == "wrong"} == expected
    assert not all(verdict.healthy for verdict in verdicts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", doctor.PROJECTIONS)
def test_a_kernel_that_is_wrong_by_weights_in_8_bits_alone_is_named(op: str, dtype: torch.dtype) -> None:
    def without_scales(*args: Any, **named: Any) -> torch.Tensor:
        wrong = [Int8Weight(a.values, a.scales.roll(1)) if isinstance(a, Int8Weight) else a for a in args]
        out: torch.Tensor = getattr(reference, op)(*wrong, **named)
        return out

    verdicts = doctor.check_running(kernels(**{op: without_scales}), dtype, CPU, full_width=False)
    assert {verdict.op for verdict in verdicts if verdict.outcome == "wrong"} == {f"{op} x int8"}


def test_a_kernel_that_draws_another_code_is_named() -> None:
    def off_by_one(*args: torch.Tensor, **named: int) -> torch.Tensor:
        return reference.sample(*args, **named).add_(1).clamp_(max=30)

    verdicts = doctor.check_running(kernels(sample=off_by_one), torch.float32, CPU, full_width=False)
    [wrong] = [verdict for verdict in verdicts if verdict.outcome == "wrong"]
    assert wrong.op == "sample"


def test_a_kernel_that_leaves_nan_is_named() -> None:
    verdicts = doctor.check_running(
        kernels(glu=lambda x, out: out.fill_(torch.nan)), torch.float32, CPU, full_width=False
    )
    assert "glu" in {verdict.op for verdict in verdicts if verdict.outcome == "wrong"}


def test_a_kernel_that_raises_is_named_and_the_others_are_still_checked() -> None:
    def raising(*args: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of resources: shared memory\nand more lines")

    verdicts = {v.op: v for v in doctor.check_running(kernels(glu=raising), torch.float32, CPU, full_width=False)}
    assert (verdicts["glu"].outcome, verdicts["glu"].detail) == (
        "failed",
        "RuntimeError: out of resources: shared memory",
    )
    assert verdicts["sample"].outcome == "ok"


def test_interpreted_on_a_cpu() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = command("--json", TRITON_INTERPRET="1")
    report = json.loads(done.stdout)
    assert (done.returncode, report["healthy"], report["backend"]) == (0, True, "torch")
    assert {kernel["outcome"] for kernel in report["kernels"]} == {"ok"}
    assert "interpreted" in report["not_checked"][0]
    assert report["environment"]["torch"] == torch.__version__


@pytest.mark.slow
def test_compiled_on_a_cpu() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = command()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled  for sm_90") == len(doctor.OPS)
    assert "not checked: what the kernels compute" in done.stdout


def test_an_unknown_target_is_refused() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = command("--targets", "h100")
    assert done.returncode == 2
    assert "--targets: target: 'h100' is not of the form sm_90 or gfx942" in done.stderr


def test_without_triton_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dia_fast.cli import doctor as cli
    from dia_fast.cli import main

    monkeypatch.setattr("dia_kernels.ops.triton_obstacle", lambda device: "triton is not installed")
    monkeypatch.setattr(cli, "_has_triton", lambda: False)
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("unchecked triton is not installed") == len(doctor.OPS)
    assert "not checked: all kernels: triton is not installed" in said


def of_model(folder: Path, *options: str) -> list[str]:
    return ["doctor", "--device", "cpu", "--dtype", "fp32", "--model", str(folder), *options]


def test_a_model_is_loaded_and_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dia_fast.cli import main

    make_model(tmp_path / "model")
    make_codec(tmp_path / "model" / "codec")
    assert main([*of_model(tmp_path / "model"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [verdict["outcome"] for verdict in report["kernels"]] == ["ok"]
    assert "every number of 86 steps is finite" in report["kernels"][0]["detail"]


@pytest.mark.parametrize("part", ["model", "codec"])
def test_damaged_weights_are_named(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dia_fast.cli import main

    make_model(tmp_path / "model")
    make_codec(tmp_path / "model" / "codec")
    file = next((tmp_path / "model" / ("" if part == "model" else "codec")).glob("*.safetensors"))
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    assert main(of_model(tmp_path / "model")) == 2
    assert name in (told := capsys.readouterr().err) and ("damaged: 1 of its" in told or "finite" in told)


@pytest.mark.parametrize(
    ("broken", "outcome", "said"),
    [
        ({"rms_norm_glu": lambda *given, **named: reference.rms_norm_glu(*given, **named).mul_(1.05)}, "wrong", "rms_"),
        ({}, "ok", "of what is allowed"),
    ],
    ids=["broken", "sound"],
)
def test_kernels_are_compared_on_its_weights(
    broken: dict[str, object], outcome: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model"))
    codec = make_codec(tmp_path / "codec")
    monkeypatch.setattr(doctor, "choose_ops", lambda backend, device: kernels(**broken))
    verdict = doctor.check_model(checkpoint, str(codec), torch.float32, CPU, True)
    assert verdict.outcome == outcome and said in verdict.detail


def test_a_model_that_leaves_numbers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model"))
    codec = make_codec(tmp_path / "codec")
    monkeypatch.setattr(reference, "codebook_logits", lambda *given, **named: given[-1].fill_(torch.nan))
    verdict = doctor.check_model(checkpoint, str(codec), torch.float32, CPU, True)
    assert verdict.outcome == "failed" and "damaged" in verdict.detail
