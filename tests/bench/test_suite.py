"""The benchmark suite without a GPU: the device is replaced by one whose clock counts, everything else is real."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import plots
from bench.device import Device, Moment, measure_peaks
from bench.suite import __main__ as suite
from bench.suite import backends, cases, table
from bench.suite.stages import Models, Stage, Work
from bench.tools import results
from dia_fast.diagnostics.doctor import OPS
from dia_fast.diagnostics.roofline import work
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes
from dia_kernels import reference

ROOT = Path(__file__).resolve().parents[2]


def run_suite(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A quick run with the planted device; `arguments` before `--` are the suite's.

    It knows nothing of the workers that run this test: pytest-benchmark times nothing within one.
    """
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    given = [*arguments, *(() if "--" in arguments else ("--",)), "-p", "tests.helpers.planted"]
    return subprocess.run(
        [sys.executable, "-m", "bench.suite", "--quick", "--device", "cpu", "--out", str(folder), *given],
        cwd=ROOT, env={**alone, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def measured(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Benchmarks by op and backend."""
    found = json.loads((folder / "suite.json").read_text())["benchmarks"]
    return {(item["extra_info"]["op"], item["extra_info"]["backend"]): item for item in found}


RAISING = """
from bench.suite.cases import Case
make = Case.make
def fail(case, *given):
    if case.op == "embed_codes":
        raise MemoryError("there is no room for it\\nand much more")
    return make(case, *given)
Case.make = fail
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run in which one kernel leaves its last program out, another is distrusted, and one op has no arguments."""
    folder, plugins = tmp_path_factory.mktemp("planted"), tmp_path_factory.mktemp("plugins")
    (plugins / "raising.py").write_text(RAISING)
    done = run_suite(
        folder, "--backends", "torch", "triton", "--distrust", "glu", "--", "-p", "raising",
        "-k", "rms_norm_linear-rows-1-256-to-256 or rms_norm-tokens-64 or glu-tokens-64 or embed_codes",
        DIA_PLANTED="_rms_norm_linear", PYTHONPATH=os.pathsep.join([str(plugins), *sys.path]),
    )  # fmt: skip
    return folder, done


OWN = """
from dia_kernels import reference

def glu(x, out):
    return reference.glu(x, out)

def rms_norm(x, weight, eps, out):
    return reference.rms_norm(x, weight, eps, out).mul_(1.5)
"""


def test_ops_of_ones_own_are_timed_beside_the_shipped_ones(tmp_path: Path) -> None:
    """Wrong ones have no speed, and those that are shipped are not timed twice."""
    (tmp_path / "own_ops_of_mine.py").write_text(OWN)
    done = run_suite(
        tmp_path, "--backends", "torch", "--ops", "own_ops_of_mine", "--",
        "-k", "rms_norm-tokens-64 or glu-tokens-64 or rope-tokens-64",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    times = measured(tmp_path)
    assert ("glu", "own") in times and ("glu", "torch") in times and ("rope", "torch") in times
    assert ("rms_norm", "own") not in times and ("rope", "own") not in times
    assert "own, µs" in done.stdout and "the shipped op: --ops names no other one" in done.stdout
    table_of = [sys.executable, "-m", "pytest_benchmark", "compare", "suite.json", "--csv=times.csv"]
    subprocess.run(table_of, cwd=tmp_path, check=True, capture_output=True)
    with (tmp_path / "times.csv").open(encoding="utf-8") as file:
        written = {(line["param:case"], line["param:backend"]) for line in csv.DictReader(file)}
    glu = "glu-tokens-64-width-1024"
    others = {(name, "torch") for name in ("rms_norm-tokens-64-width-128", "rope-tokens-64-width-768")}
    assert written == {(glu, "own"), (glu, "torch"), *others}


def test_a_broken_kernel_is_reported_and_has_no_speed(
    planted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = planted
    assert done.returncode == 1, done.stdout + done.stderr
    found = measured(folder)
    assert ("rms_norm_linear", "torch") in found
    assert ("rms_norm_linear", "triton") not in found
    text = (folder / "suite.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| rms_norm_linear-rows-1")]
    assert len(rows) == 2 and sum("-x-int8 |" in row for row in rows) == 1
    assert all("**wrong**" in row and row in done.stdout for row in rows) and "error inf times what is allowed" in text


def test_the_others_are_timed_all_the_same(planted: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    found = measured(planted[0])
    assert {("rms_norm", "torch"), ("rms_norm", "triton")} <= set(found)


def test_what_was_found_wrong_before_has_no_speed_either(
    planted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    found = measured(planted[0])
    assert ("glu", "torch") in found and ("glu", "triton") not in found
    assert "glu: was found wrong before" in (planted[0] / "suite.md").read_text()


def test_what_raises_is_in_the_table_with_its_reason(
    planted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    text = (planted[0] / "suite.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith("| embed_codes-")]
    assert row.count("**failed**") == 2
    [line] = [line for line in text.splitlines() if line.startswith("- embed_codes-") and "on triton" in line]
    assert line.endswith("on triton: MemoryError: there is no room for it")


def test_times_and_shares_are_those_of_the_clock(planted: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Every span of the counting clock is one tick of a millisecond, the device's own peaks included."""
    run = json.loads((planted[0] / "suite.json").read_text())
    peaks = run["machine_info"]["measured"]
    for item in run["benchmarks"]:
        facts = item["extra_info"]
        assert item["stats"]["median"] == pytest.approx(1e-3) and item["stats"]["iqr"] == pytest.approx(0)
        assert facts["calls"] == 1 and facts["cold"]
        assert facts["bandwidth"] == pytest.approx(facts["bytes"] / 1e-3)
        assert facts["share_of_bandwidth"] == pytest.approx(facts["bytes"] / 1e-3 / peaks["bandwidth"])
        assert facts["share_of_compute"] == pytest.approx(facts["operations"] / 1e-3 / peaks["compute"])


def test_a_run_names_no_machine_and_leaves_no_temporary_files(
    planted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    text = (planted[0] / "suite.json").read_text()
    assert os.uname().nodename not in text and str(ROOT) not in text
    names = {path.name for path in planted[0].iterdir()}
    pictures = {f"{name}-{theme}.{kind}" for name in ("roofline", "kernels") for theme in ("light", "dark")
                for kind in ("png", "svg")}  # fmt: skip
    assert names == {"suite.json", "suite.md", *pictures}


def test_a_slower_run_fails_beside_an_earlier_one(
    planted: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    before = str(planted[0] / "suite.json")
    done = run_suite(
        tmp_path, "--backends", "torch", "--compare", before, "--fail-at", "10", "--", "-k", "glu-tokens-64",
        DIA_TICK="0.0012",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| glu-tokens-64") and "slower" in line]
    assert row.endswith("| torch | 1000 | 1200 | **+20.0%, slower than allowed** |")
    # The figures of a slower run are what one wants to look at.
    assert row in (tmp_path / "suite.md").read_text() and ("glu", "torch") in measured(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".md", ".svg", ".png"}


def timed(**microseconds: float) -> dict[str, Any]:
    """A run of that many benchmarks."""
    return {
        "benchmarks": [
            {"group": name, "extra_info": {"backend": "torch"}, "stats": {"median": value / 1e6}}
            for name, value in microseconds.items()
        ]
    }


def test_medians_are_compared_where_both_runs_have_them() -> None:
    before, now = timed(a=100, b=100, gone=1), timed(a=109, b=111, new=1)
    slower = {item["group"]: item["slower"] for item in table.compared(before, now, 10)}
    assert slower == {"a": False, "b": True} and suite.regressed(table.compared(before, now, 10))
    assert not suite.regressed(table.compared(before, now, 12))
    assert not any(item["slower"] for item in table.compared(before, now, None))
    assert suite.regressed(table.compared(timed(other=1), now, 10)), "nothing in common says nothing"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "no/such/run.json"], "there is no file no/such/run.json"),
        (["--compare", "tests"], "--compare: tests is no suite.json of this suite: IsADirectoryError"),
        (["--compare", "bench/baseline.json"], "--compare: bench/baseline.json is no suite.json of this suite"),
        (["--fail-at", "5"], "needs --compare"),
        (["--dtype", "fp64"], "dtype 'fp64' is not supported; use float32, bfloat16 or float16"),
        (["--device", "gpu"], "device 'gpu' is unknown; use 'cpu'"),
        (["--device", "cuda:97"], "device 'cuda:97' "),
        (["--out", "Makefile/suite"], "--out: cannot write to Makefile/suite: Not a directory"),
    ],
)
def test_options_that_cannot_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pytest, "main", lambda given: pytest.fail("was run"))
    assert suite.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_every_op_has_cases() -> None:
    assert {case.op for case in cases.all_cases(torch.float32, (2,))} == set(OPS)


@pytest.mark.parametrize(
    ("name", "moved"),
    [  # what `python -m bench.traffic --rows 2` counts, the minimum of each launch
        ("embed_codes-requests-1-rows-2", 45_200),
        ("rms_norm_linear-rows-2-2048-to-3072", 12_582_912 + 24_576),
        ("rope_attention-rows-2-context-64", 262_144 + 21_776),
        ("rope_attention-rows-2-context-1024", (4_194_304 + 288_336) / 1.0632),
        ("rope_attention-rows-2-context-3072", (12_582_912 + 821_328) / 1.0634),
        ("cross_attention-rows-1-text-256", (2_097_152 + 75_172) / 1.0318),
        ("rms_norm_glu-rows-2-2048-to-16384", 67_108_864 + 45_056),
        ("rms_norm_glu-rows-2-2048-to-16384-x-int8", 33_554_432 + 4 * 16384 + 45_056),
        ("linear_residual-rows-2-8192-to-2048", 33_554_432 + 49_152),
        ("codebook_logits-rows-2-2048-to-9252", 37_896_192 + 86_304),
    ],
)
def test_bytes_are_the_minimum_that_the_meter_counts(name: str, moved: float) -> None:
    found = {case.name: case.cost.bytes for case in cases.all_cases(torch.bfloat16, (1, 2))}
    assert found[name] == pytest.approx(moved, rel=0.006)


def test_operations_of_a_product() -> None:
    found = {case.name: case.cost.operations for case in cases.all_cases(torch.bfloat16, (8,))}
    assert found["rms_norm_glu-rows-8-2048-to-16384"] == 2 * 8 * 2048 * 16384
    assert found["rope_attention-rows-8-context-1024"] == 4 * 8 * 1024 * 2048


def stage_work(stage: Stage) -> tuple[DiaConfig, Work]:
    models = Models(Device(torch.device("cpu")), torch.float32, quick=True)
    return models.config, models.work(stage, reference)


@pytest.mark.parametrize("stage", [Stage("step", 64, 2), Stage("step", 300)])
def test_work_of_a_step_is_that_of_its_launches(stage: Stage) -> None:
    config, found = stage_work(stage)
    step = work.Step(stage.requests, stage.size, cases.TEXT, 4, True, stage.requests, 400, cases.TEXT)
    launches = work.launches(config, step, work.Tiles(lambda name, rows: 16, 128, 64, False))
    products = [item for item in launches if item.name not in ("embed", "sample")]
    assert found.operations == sum(item.times * item.flops for item in products)
    norms = 4 * config.decoder.hidden_size * (3 * config.decoder.num_hidden_layers + 1)
    assert found.bytes == sum(item.times * item.streamed for item in products) + norms


@pytest.mark.parametrize("stage", [Stage("prefill", 43), Stage("encode", 60)])
def test_work_of_many_rows_is_that_of_their_products(stage: Stage) -> None:
    config, found = stage_work(stage)
    ops, pairs = SimpleNamespace(**{op: getattr(reference, op) for op in reference.__all__}), []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, out: torch.Tensor, *,
               causal: bool, block_table: Any = None, kv_lengths: Any = None) -> None:  # fmt: skip
        for length in starts.diff().tolist():
            seen = cases.TEXT if block_table is not None else (length + 1) / 2 if causal else length
            pairs.append(4 * length * seen * out.shape[1])
        out.zero_()

    ops.ragged_attention = attend
    with FlopCounterMode(display=False) as counter:
        found.call(ops)
    assert found.operations == counter.get_total_flops() + sum(pairs)
    side = f"{'decoder' if stage.kind == 'prefill' else 'encoder'}.layers"
    weights = {name: 4 * math.prod(shape) for name, shape in fused_shapes(config).items() if name.startswith(side)}
    used = {name: size for name, size in weights.items() if "norm" not in name and "cross_kv" not in name}
    twice = stage.kind == "prefill"  # for either half, of which one has no text
    decoder = config.decoder
    # A row's keys and values of both branches, and those of a text that all rows read.
    row, text = 2 * 4 * decoder.num_key_value_heads * decoder.head_dim, 2 * 4 * 2 * decoder.cross_head_dim
    stored = 2 * 43 * row + cases.TEXT * text if stage.kind == "prefill" else 0
    assert found.bytes == sum(size * (1 + (twice and "cross" not in name)) for name, size in used.items()) + stored


@pytest.mark.parametrize("case", cases.all_cases(torch.float32, (2,), quick=True), ids=lambda case: case.name)
def test_arguments_are_such_that_the_op_writes_numbers(case: cases.Case) -> None:
    """And sets of arguments differ, so that a round of them is not the same one again and again."""
    first, second = (case.make(reference, torch.device("cpu"), seed) for seed in (0, 1))
    random = [name for name, value in first.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert any(not torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in random)
    verdicts = backends.compare(reference, lambda ops: case.call(ops, first)())
    assert [verdict.outcome for verdict in verdicts] == ["ok"]
    written = [value for value in first.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert all(bool(value.isfinite().all()) for value in written)


def test_a_span_is_divided_by_the_calls_in_it() -> None:
    clock = Device(torch.device("cpu"))
    clock.calls = 4
    assert Moment(clock, 3.0) - Moment(clock, 1.0) == 0.5


def test_peaks_of_this_machine_are_plausible() -> None:
    peaks = measure_peaks(Device(torch.device("cpu")), torch.float32, quick=True)
    assert 1e8 < peaks.bandwidth < 1e13 and 1e8 < peaks.compute < 1e15


def test_a_run_that_broke_off_says_so() -> None:
    machine = {"device": "d", "torch": "t", "triton": "t", "dtype": "d", "size": "s", "vectors": "none",
               "measured": {"bandwidth": 1.0, "compute": 1.0}}  # fmt: skip
    run = {"machine_info": machine, "benchmarks": [], "verdicts": [], "complete": False}
    assert "broken off" in table.markdown(run) and "no vector instructions" in table.markdown(run)


def synthetic_step(backend: str, requests: int, context: int, seconds: float) -> dict[str, Any]:
    facts = {"kind": "step", "backend": backend, "requests": requests, "size": context, "bytes": 1000 * requests,
             "operations": 10, "decoder_layers": 18}  # fmt: skip
    return {"group": "g", "extra_info": facts, "stats": {"median": seconds, "q1": seconds * 0.9, "q3": seconds * 1.1}}


def test_steps_become_pictures_of_latency_and_throughput(tmp_path: Path) -> None:
    machine = {"device": "d", "dtype": "d", "size": "s", "torch": "t", "measured": {"bandwidth": 1e6, "compute": 1e9}}
    steps = [synthetic_step("torch", 1, 64, 0.02), synthetic_step("triton", 1, 64, 0.01),
             synthetic_step("triton", 1, 1024, 0.015), synthetic_step("triton", 4, 64, 0.012)]  # fmt: skip
    paths = plots.draw_suite({"machine_info": machine, "benchmarks": steps}, tmp_path)
    assert {path.name.split("-")[0] for path in paths} == {"latency", "throughput"} and len(paths) == 8
    assert all(path.read_bytes()[:4] in (b"\x89PNG", b"<?xm") for path in paths)


def test_traffic_becomes_a_picture(tmp_path: Path) -> None:
    counted = {"kernel": "k", "rows": 2, "context": 64, "weights": 80, "kv": 10, "other": 12, "minimum": 100}
    case = {name: counted.pop(name) for name in ("rows", "context", "kernel")}
    run = results.header("traffic", [], torch.device("cpu")) | {"status": 0}
    run["results"] = [{"case": case, "values": counted}]
    (tmp_path / "traffic.json").write_text(results.dump(run))
    assert plots.main(["--traffic", str(tmp_path / "traffic.json"), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_file_of_something_else_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("[1]")
    assert plots.main(["--suite", str(tmp_path / "x.json")]) == 2
    assert plots.main(["--traffic", str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
