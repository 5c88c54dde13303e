"""Regressions planted in the kernels, the model and the process: the gate has to turn red, and was green before."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from bench import baseline, check, metrics
from bench.baseline import Group, Kind, group_of
from bench.tools.tiny_models import make_transformers_checkpoint, tiny_config
from dia_kernels import launcher as launch
from dia_kernels import reference
from dia_kernels import triton as kernels
from tests.kernels import executor
from tests.kernels.test_traffic import wide

ROOT = Path(__file__).parents[2]
interpreted = pytest.mark.skipif(not executor.interpreted(), reason="accesses are counted in the interpreter only")


@triton.jit
def _linear_residual(
    x_ptr, weight_ptr, scale_ptr, residual_ptr, constant_ptr, rows, all_rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As the kernel of that name; right, but every tile of the weight is loaded twice."""
    n = tl.program_id(0)
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + r[:, None] * K + start + k[None, :], mask=(r < rows)[:, None], other=0.0)
        first = tl.load(weight_ptr + n * K + start + k)
        again = tl.load(weight_ptr + n * K + start + k)
        mean = (first.to(tl.float32) + again.to(tl.float32)) / 2
        total += tl.sum(x.to(tl.float32) * mean[None, :], 1)
    old = tl.load(residual_ptr + r * N + n, mask=r < all_rows, other=0.0)
    if BLOCK_C > 0:
        constant = tl.load(constant_ptr + n).to(tl.float32)
        total = tl.where(r < rows, total, constant)
    tl.store(residual_ptr + r * N + n, (old.to(tl.float32) + total).to(old.dtype), mask=r < all_rows)


def greedy(run: launch.Launcher, kernel: Any, grid: Any, args: Any, meta: dict[str, Any]) -> None:
    """Launch the kernel above in place of the real one."""
    if kernel.fn.__name__ != "_linear_residual":
        run(kernel, grid, *args, **meta)
        return
    sizes = {name: meta[name] for name in ("N", "K", "BLOCK_C")}
    run(_linear_residual, (meta["N"],), *args, **sizes, BLOCK_R=triton.next_power_of_2(args[6]), BLOCK_K=32)


def gate(tmp_path: Path, name: str, sound: Group, now: Group) -> int:
    """The exit status of a check that measures `now` where `sound` is recorded."""
    file = tmp_path / "baseline.json"
    baseline.write(file, {name: sound})
    return check.main(["--only", name, "--baseline", str(file)], lambda *_: now)


def worse(printed: str) -> list[str]:
    """The lines of the table that say so."""
    return [line for line in printed.splitlines() if line.endswith("  WORSE")]


@interpreted
def test_a_kernel_that_reads_its_weights_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = metrics.traffic((2,), (5,), config=wide())
    assert gate(tmp_path, "traffic", sound, sound) == 0
    capsys.readouterr()
    with launch.listening(greedy):
        now = metrics.traffic((2,), (5,), config=wide())
    assert gate(tmp_path, "traffic", sound, now) == 1
    told = worse(capsys.readouterr().out)
    assert all("linear_residual" in line for line in told)
    assert sum("not read once" in line for line in told) == 3  # O, cross O and down
    assert sum(", moved" in line for line in told) == 3


@interpreted
def test_the_greedy_kernel_is_right() -> None:
    """Or it would not be the regression that no other test sees."""
    generator = torch.Generator().manual_seed(0)
    x, weight, residual = (torch.randn(shape, generator=generator) for shape in ((1, 256), (48, 256), (2, 48)))
    constant = torch.randn(48, generator=generator)
    expected = reference.linear_residual(x, weight, residual.clone(), constant)
    with launch.listening(greedy):
        got = kernels.linear_residual(x, weight, residual.clone(), constant)
    torch.testing.assert_close(got, expected)


def test_an_op_that_launches_one_kernel_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = baseline.read(check.BASELINE)["launches"]
    assert gate(tmp_path, "launches", recorded, metrics.launches()) == 0
    capsys.readouterr()
    glu = kernels.rms_norm_glu

    def split(x: Any, norm: Any, weight: Any, eps: float, out: Any) -> Any:
        kernels.rms_norm(x, norm, eps, torch.empty_like(x))
        return glu(x, norm, weight, eps, out)

    monkeypatch.setattr(kernels, "rms_norm_glu", split)
    assert gate(tmp_path, "launches", recorded, metrics.launches()) == 1
    told = worse(capsys.readouterr().out)
    assert [line.split()[-5:-2] for line in told] == [["147", "165", "147"]] * 2 + [["19", "21", "19"]] * 2


MEASURED = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from bench import metrics
{plant}
print(json.dumps(asdict({measure})))
"""


def in_a_process(measure: str, plant: str = "", **environment: str) -> Group:
    """Return what `measure` returns in a new process that compiles, after `plant` was executed there."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), kept.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", MEASURED.format(plant=plant, measure=measure)],
        env=kept | {"PYTHONPATH": paths} | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return group_of(json.loads(run.stdout))


# The products of one decode step alone: what has to be compiled for this test is little.
ONE_KERNEL = """
from dia_fast.diagnostics import launches
import torch
from dia_kernels import triton as kernels
def little(dtype, *_):
    shapes = (2, 2048), (2048,), (3072, 2048), (2, 3072)
    x, norm, weight, out = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    kernels.rms_norm_linear(x, norm, weight, 1e-5, out)
launches.prefill = little
"""


def test_a_kernel_with_too_many_live_registers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure = "metrics.codegen(('sm_90', 'gfx1100'), rows=())"
    sound = in_a_process(measure, ONE_KERNEL)
    assert gate(tmp_path, "codegen", sound, sound) == 0
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rms_norm_linear": [{"use": {"DEPTH": 64, "BLOCK_N": 64}}]}))
    capsys.readouterr()
    now = in_a_process(measure, ONE_KERNEL, DIA_KERNELS_TABLE=str(table))
    assert gate(tmp_path, "codegen", sound, now) == 1
    spills = [line for line in worse(capsys.readouterr().out) if ", spills" in line]
    assert [line.split()[1] for line in spills] == ["sm_90", "gfx1100"]


# Weights that are kept twice, and a decode step that leaks.
WASTEFUL = """
import torch
from dia_fast.model.model import DiaModel
load, step, kept = DiaModel.load, DiaModel.decode_step, []
def copying(self, weights):
    kept.extend(weight.clone() for weight in weights.values())
    return load(self, weights)
def leaking(self, state):
    kept.append(torch.ones(1 << 18))
    step(self, state)
DiaModel.load, DiaModel.decode_step = copying, leaking
"""


def test_memory_that_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tiny_config({"hidden_size": 512, "intermediate_size": 2048}, {"hidden_size": 512, "intermediate_size": 4096})
    model = make_transformers_checkpoint(tmp_path / "model", wide, dtype=torch.bfloat16)
    measure = f"metrics.memory(Path({str(model)!r}))"
    sound = in_a_process(measure)
    assert gate(tmp_path, "memory", sound, sound) == 0
    capsys.readouterr()
    assert gate(tmp_path, "memory", sound, in_a_process(measure, WASTEFUL)) == 1
    assert [line.split(",")[0] for line in worse(capsys.readouterr().out)] == ["memory: loading", "memory: speaking"]


def test_a_pool_with_larger_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dia_fast.model.config import DiaConfig
    from dia_fast.model.decode_state import DecodeState, Sizes

    def held(rows: int) -> Group:
        sizes = Sizes(1, True, rows, 8, 4, 1)
        state = DecodeState(DiaConfig(), reference, sizes, torch.bfloat16, torch.device("meta"))
        figures: dict[str, float] = {"allocated": metrics.storage_bytes(state)}
        return Group({"allocated": Kind("bytes", "lower", 0.0, 0.0, metrics.COUNTED)}, {"pool": figures})

    assert gate(tmp_path, "memory", held(3072), held(3072)) == 0
    assert gate(tmp_path, "memory", held(3072), held(3073)) == 1


def test_an_op_that_does_its_work_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_transformers_checkpoint(tmp_path / "model", tiny_config(), dtype=torch.bfloat16)
    monkeypatch.setattr(metrics, "required", dict)  # bars are for the sizes of Dia-1.6B: a run is compared with a run

    def ratio() -> Group:
        return metrics.ratio(model, steps=8, rounds=2, requests=(1,), text=9)

    sound = ratio()
    assert gate(tmp_path, "ratio", sound, sound) == 0
    capsys.readouterr()
    glu = reference.rms_norm_glu

    def slow(*arguments: Any) -> Any:
        for _ in range(200):
            glu(*arguments)
        return glu(*arguments)

    monkeypatch.setattr(reference, "rms_norm_glu", slow)
    assert gate(tmp_path, "ratio", sound, ratio()) == 1
    [line] = worse(capsys.readouterr().out)
    assert line.startswith("ratio: requests: 1, times transformers")
