"""The codegen gate: every kernel compiled for every GPU at the shapes of the 1.6B model, judged by `bench.codegen`.

Compiling needs a process without the interpreter, so each target is one.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: there is nothing to compile with", allow_module_level=True)

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")


def compile_for(target: str, tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Runs the report in a process of its own; the result and its lines."""
    report = tmp_path / "report.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.codegen", "--targets", target, "--json", str(report), *options]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return run, json.loads(report.read_text())["lines"] if report.exists() else []


@pytest.mark.parametrize("target", TARGETS)
def test_one_request_in_bf16(target: str, tmp_path: Path) -> None:
    run, lines = compile_for(target, tmp_path, "--rows", "2", "--dtypes", "bfloat16")
    assert run.returncode == 0, run.stderr
    kernels = {line["kernel"] for line in lines}
    assert kernels == {
        "embed_codes", "rms_norm_linear", "rope_attention", "linear_residual", "cross_attention", "rms_norm_glu",
        "codebook_logits", "sample", "rms_norm", "rope", "ragged_attention", "glu", "snake",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("target", TARGETS)
def test_every_row_count_and_dtype(target: str, tmp_path: Path) -> None:
    run, lines = compile_for(target, tmp_path)
    assert run.returncode == 0, run.stderr
    assert {(line["rows"], line["dtype"]) for line in lines} == {
        (rows, dtype) for rows in (0, 1, 2, 8, 32, 64) for dtype in ("bfloat16", "float16", "float32")
    }


def sound():
    from bench.codegen import Line

    return Line(
        target="sm_90", dtype="bfloat16", rows=2, kernel="rms_norm_glu", programs=1024, warps=8, registers=128,
        spills=0, shared=4096, occupancy=0.25, weight_bits=128, matrix={"HMMA.16816.F32.BF16": 32}, instructions=1000,
        in_flight=65536.0, issue=0.4,
    )  # fmt: skip


def test_a_sound_kernel_passes() -> None:
    from bench.codegen import violations

    assert violations(sound()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 8}, "spills 8"),
        ({"shared": 300_000}, "300000 bytes of shared memory"),
        ({"weight_bits": 64}, "64 bits wide"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"issue": 0.61}, "61% of the issue slots"),
        ({"in_flight": 20_000.0}, "KB of weights in flight"),
    ],
)
def test_each_defect_is_named(change: dict, message: str) -> None:
    from bench.codegen import violations

    found = violations(dataclasses.replace(sound(), **change))
    assert len(found) == 1
    assert message in found[0]
    assert "rms_norm_glu on sm_90, bfloat16, 2 rows" in found[0]


def test_loads_without_a_hint_count_up_to_the_last_product() -> None:
    from bench.machine_code import Code, Instruction

    wide, narrow = Instruction("buffer_load_b128", bits=128), Instruction("buffer_load_b64", bits=64)
    product = Instruction("v_wmma_f32_16x16x16_bf16")
    assert Code((wide, narrow, product, narrow), 1, 0, 0).weight_loads() == [wide, narrow]
    hinted = Instruction("buffer_load_dwordx4", bits=128, hint=True)
    assert Code((narrow, hinted, product), 1, 0, 0).weight_loads() == [hinted]


def test_instructions_that_change_with_the_rows_are_named() -> None:
    from bench.codegen import mnemonics_differ

    other = dataclasses.replace(sound(), rows=64, matrix={"HGMMA.64x16x16.F32.BF16": 4})
    assert mnemonics_differ([sound(), dataclasses.replace(sound(), rows=8)]) == []
    [found] = mnemonics_differ([sound(), other])
    assert "HGMMA" in found and "rms_norm_glu on sm_90" in found


def test_the_report_refuses_an_unknown_target(tmp_path: Path) -> None:
    run, _ = compile_for("sm_7", tmp_path)
    assert run.returncode == 2
    assert "invalid choice: 'sm_7'" in run.stderr
