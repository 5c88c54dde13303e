"""`bench.tune` and `bench.ablation`: what is tried, what is kept, and that a table reaches its launches.

Times need a GPU; here they come from a function, and steps run on the torch ops.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ablation, captured, offline, tune
from bench.captured import CapturedStep, Load
from bench.device import Device
from bench.tools import results
from dia_fast.diagnostics import launches as steps
from dia_fast.model.config import DecoderConfig, DiaConfig
from dia_kernels import get_ops
from dia_kernels import launcher as launch
from dia_kernels.triton import gemv

ROOT = Path(__file__).resolve().parents[2]
ROWS = [1, 2, 16, 64]


@pytest.fixture(autouse=True)
def _no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIA_KERNELS_TABLE", "")


OTHER = DiaConfig(decoder=DecoderConfig(
    hidden_size=1024, intermediate_size=3072, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    cross_num_attention_heads=4, cross_num_key_value_heads=4, cross_head_dim=128, num_hidden_layers=1,
))  # fmt: skip


def configurations(rows: int, weights: str = "float", config: DiaConfig | None = None) -> list[dict[str, Any]]:
    """Options of every launch of a step of one layer, in order."""
    seen: list[dict[str, Any]] = []

    def note(run: Any, kernel: Any, grid: Any, args: Any, meta: dict[str, Any]) -> None:
        tile = meta["T"]._asdict() if "T" in meta else {}
        seen.append({"kernel": kernel.fn.__name__, **meta, **tile})

    with launch.listening(note):
        steps.decode(rows, torch.bfloat16, model=steps.one_layer(torch.bfloat16, config=config, weights=weights))
    return seen


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("weights", "config"),
    [("float", DiaConfig()), ("int8", DiaConfig()), ("int8-mlp", DiaConfig()), ("float", OTHER), ("int8-mlp", OTHER)],
    ids=["float", "int8", "int8-mlp", "float, other sizes", "int8-mlp, other sizes"],
)
def test_every_launch_of_a_step_is_tuned_by_exactly_one_entry(
    rows: int, weights: str, config: DiaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = configurations(rows, weights, config)
    changed = [0] * len(before)
    for one in tune.launches(rows, "bfloat16", None, weights, config):
        if one.kind:  # the same launches once more
            continue
        for use in tune.candidates(one, [(8, 2)]):
            monkeypatch.setenv(
                "DIA_KERNELS_TABLE", str(tune.write_table(tmp_path / f"{one.name}{use}.json", [(one, use)]))
            )
            after = configurations(rows, weights, config)
            differ = [index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
            if differ:
                break
        for index in differ:
            assert all(after[index][name] == value for name, value in use.items())
            changed[index] += 1
    assert changed == [1] * len(before)


def test_the_order_of_sums_in_8_bits_is_that_of_their_own_configs(tuner: tune.Tuner) -> None:
    tuner.options.weights = "int8"
    [qkv] = [one for one in tuner.launches(2) if one.name == "qkv"] or tune.launches(2, "bfloat16", ["qkv"], "int8")
    assert qkv.in_8_bits and tuner.orders(qkv) == tune.INT8_ORDERS
    tuner.decide(qkv, None)
    shape = {"rows": 2, "features": 3072, "hidden": 2048, "weight_bits": 8}
    default = gemv.default_config("rms_norm_linear", torch.bfloat16, tuner.arch, **shape)
    assert tuner.orders(qkv) == [(default["SPLIT_K"], default["CHUNKS"])]
    assert all(use["BLOCK_N"] >= 16 for use in tune.candidates(qkv, tune.INT8_ORDERS))


def test_what_orders_a_sum_is_decided_once_for_all_numbers_of_rows(tuner: tune.Tuner) -> None:
    """By the default, too, where nothing was faster; and rows that were not tuned follow."""
    tuner.run()
    tuner.options.margin = 9.0
    tuner.decide(tune.launches(2, "bfloat16", ["qkv"])[0], None)
    tuner.decide(tune.launches(2, "bfloat16", ["heads ahead"])[0], {"X_AHEAD": 4})  # orders nothing
    [down] = tune.launches(16, "bfloat16", ["down"])
    [order] = tuner.orders(down)
    assert {(use["SPLIT_K"], use["CHUNKS"]) for use in tune.candidates(down, [order])} == {order}
    assert len(tuner.orders(tune.launches(16, "bfloat16", ["o"])[0])) > 2
    table = tuner.table()
    for name in ("gate_up", "down", "qkv"):
        op, shape = tune.PROJECTIONS[name], tune.shapes(DiaConfig())[name]
        found = {
            (config["SPLIT_K"], config["CHUNKS"], config["num_warps"])
            for rows in range(1, 65)
            for config in [
                launch._configuration(
                    op, gemv._DEFAULTS[op], torch.bfloat16, "sm_90", table, rows=rows, weight_bits=16, **shape
                )
            ]
        }
        assert len(found) == 1, name


class _Step:
    """In place of a captured step: its time is a function of the table."""

    def __init__(self, *_: Any) -> None:
        with open(os.environ["DIA_KERNELS_TABLE"]) as file:
            self.table = json.load(file)

    def seconds(self) -> float:
        taken = 1.0
        for entries in self.table.values():
            use = entries[0]["use"]
            if use.get("BLOCK_N") == 32:
                raise RuntimeError("out of registers\nmore about it")
            taken -= 0.1 * (use.get("BLOCK_N") == 8) + 0.01 * (use.get("DEPTH") == 8)
        return taken


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tune.Tuner]:
    monkeypatch.setattr(tune, "CapturedStep", _Step)
    monkeypatch.setattr(tune, "state_for", lambda model, load: None)
    monkeypatch.setattr(tune, "random_model", lambda *_: None)
    monkeypatch.setattr("dia_kernels.get_ops", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda *_: None)
    options = argparse.Namespace(
        device="cpu", dtype="bfloat16", weights="float", layers=None, budget=60.0, rows=[2], only=["gate_up", "down"],
        context=9, text=9, margin=0.001, ops=None, config=None,
    )  # fmt: skip
    yield tune.Tuner(options, tmp_path)


def test_the_fastest_is_kept_for_each_launch_and_what_fails_is_noted(tuner: tune.Tuner, tmp_path: Path) -> None:
    tuner.run()
    assert {one.name: (use["BLOCK_N"], use["DEPTH"]) for one, use in tuner.chosen} == {
        "gate_up": (8, 8),
        "down": (8, 8),
    }
    failed = [trial for trial in tuner.trials if "failed" in trial]
    assert failed and all(t["use"]["BLOCK_N"] == 32 and "more about" not in t["failed"] for t in failed)
    table = launch.read_table(str(tune.write_table(tmp_path / "table.json", tuner.chosen)))
    where = {"rows": 2, "dtype": "bfloat16", "weight_bits": 16, "features": 16384, "hidden": 2048}
    assert table["rms_norm_glu"][0]["where"] == where, "weights in 8 bits keep their own configs"


def test_a_gain_below_the_margin_is_noise(tuner: tune.Tuner) -> None:
    tuner.options.margin = 0.2
    tuner.run()
    assert tuner.chosen == []


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where Triton compiles: this process may interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_candidates_are_judged_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    out, report = tmp_path / "table.json", tmp_path / "report.json"
    run = in_a_process(
        "-m", "bench.tune", "--target", "sm_90", "--out", str(out), "--only", "cross_q ahead", "--workers", "1",
        "--json", str(report), "--ops", "examples.own_glu",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 5 and lines[0].startswith("2 rows, cross_q ahead: default: ")
    assert all("KB in flight" in line for line in lines[:4]) and "4 configs, 0 out" in lines[4]
    found = results.flat(results.read(report))
    assert [one["use"] for one in found] == ["default", "X_AHEAD=1", "X_AHEAD=2", "X_AHEAD=4"]
    assert all(one["in_flight"] > 40 << 10 and 0 < one["issue"] < 0.6 and not one["problems"] for one in found)
    launch.read_table(str(out))


def test_candidates_are_those_of_the_model_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(OTHER.to_transformers()))
    options = argparse.Namespace(
        config=file, target="sm_90", dtype="bfloat16", rows=[2], only=["cross_q"], weights="float", ops=None
    )
    found = list(offline.jobs(options, tune.model_config(options), tmp_path))
    assert len(found) > 4 and {job.config for job in found} == {OTHER}
    assert {dict(job.launch.where)["features"] for job in found} == {512}
    file.write_text("{")
    assert tune.main(["--config", str(file), "--out", str(tmp_path / "t.json"), "--device", "cpu"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_an_unknown_launch_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--target", "sm_90", "--out", str(tmp_path / "t.json"), "--only", "qvk"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "'qvk'" in said and "qkv" in said


JUDGE = """
import sys
from pathlib import Path
from bench import offline, tune
from dia_fast.model.config import DecoderConfig, DiaConfig

[one] = tune.launches(2, "bfloat16", ["qkv"])
for use in ({"BLOCK_N": 7}, {"NOTHING": 3}, {"BLOCK_N": 8, "DEPTH": 1}):
    table = str(tune.write_table(Path(sys.argv[1]) / f"{len(str(use))}.json", [(one, use)]))
    print(offline._told(offline.judge(offline.Job("sm_90", "bfloat16", 2, one, use, table))))
other = DiaConfig(decoder=DecoderConfig(cross_num_attention_heads=4, cross_num_key_value_heads=4))
[small] = tune.launches(2, "bfloat16", ["cross_q"], config=other)
print(offline._told(offline.judge(offline.Job("sm_90", "bfloat16", 2, small, None, "", config=other))))
"""


def test_a_bad_candidate_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{JUDGE}")
    run = in_a_process(str(file), str(tmp_path))
    assert run.returncode == 0, run.stderr
    odd, unknown, thin, small = run.stdout.splitlines()
    assert odd.startswith("2 rows, qkv: BLOCK_N=7: out: ") and unknown.startswith("2 rows, qkv: NOTHING=3: out: ")
    assert "KB of weights in flight per SM, 40.0 needed" in thin
    assert small.startswith("2 rows, cross_q: default: out: ") and "KB of weights in flight per SM" in small


def test_the_best_of_sound_candidates_stands_before_the_default() -> None:
    from bench.codegen import Line

    qkv, down = tune.launches(2, "bfloat16", ["qkv", "down"])[::-1]

    def judged(one: tune.Launch, use: dict[str, int] | None, flight: float, issue: float, *problems: str) -> Any:
        made = Line(
            "sm_90", "bfloat16", 2, "rms_norm_linear", 132, 8, 128, 0, 0, 0.25, 128, {"HMMA": 1}, 500, flight, issue
        )
        return offline.Judged(offline.Job("sm_90", "bfloat16", 2, one, use, ""), problems, made)

    found = [
        judged(qkv, None, 5e4, 0.3), judged(qkv, {"DEPTH": 2}, 9e4, 0.3, "spills 8"),
        judged(qkv, {"DEPTH": 4}, 8e4, 0.3), judged(qkv, {"DEPTH": 8}, 8e4, 0.2),
        judged(down, None, 8e4, 0.2), judged(down, {"DEPTH": 8}, 8e4, 0.2),
    ]  # fmt: skip
    assert offline.best(found) == [(qkv, {"DEPTH": 8})]
    found[4] = judged(down, None, 8e4, 0.2, "spills 4")
    assert offline.best(found) == [(qkv, {"DEPTH": 8}), (down, {"DEPTH": 8})]


def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for main, arguments in ((tune.main, ["--out", str(tmp_path / "t.json")]), (ablation.main, [])):
        assert main([*arguments, "--device", "cuda"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "cuda" in said


def test_a_step_of_every_kind_runs_in_the_middle_of_its_work() -> None:
    device = Device(torch.device("cpu"))
    device.capture = lambda work: work  # type: ignore[method-assign]
    ops = get_ops("torch", device.torch)
    model = captured.random_model(torch.bfloat16, device.torch, ops, layers=1)
    load = Load(rows=2, context=70, text=5)
    with torch.inference_mode():
        state = captured.state_for(model, load)
        step = CapturedStep(device, model, state, load)
        assert len(step.spans(replays=1)) == captured.SPANS and step.seconds() > 0
        moved = captured.WARM_UP + captured.SPANS * 12
        assert state.positions.tolist() == [70 + moved - 1] * 2 and not state.finished.any()
        assert state.logits.isfinite().all() and state.logits.std() > 0.1
        state.gated.zero_()
        model.ops = captured.without(ops, "rms_norm_glu")  # type: ignore[assignment]
        CapturedStep(device, model, state, load).seconds()
        assert not state.gated.any()


def test_what_is_read_at_once_keeps_the_order_found_for_other_rows(tuner: tune.Tuner) -> None:
    [qkv] = tune.launches(2, "bfloat16", ["qkv"])
    tuner.chosen, tuner.decided = [], {}
    tuner.decide(qkv, {"SPLIT_K": 4, "num_warps": 4, "CHUNKS": 2})
    [ahead] = tune.launches(16, "bfloat16", ["qkv ahead"])
    tried = []

    def seconds(table: str) -> float:
        entries = json.loads(Path(table).read_text())["rms_norm_linear"]
        tried.append(next(e["use"] for e in entries if set(e["where"].items()) <= set(ahead.where)))
        return 1.0

    tuner.deadline = float("inf")
    tuner._best(ahead, 16, 1.0, seconds)
    assert len(tried) == 3
    assert {(use["SPLIT_K"], use["CHUNKS"]) for use in tried} == {(4, 2)}


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def none(backend: str, device: torch.device) -> None:
        raise ValueError("backend 'triton': there is no GPU")

    monkeypatch.setattr("dia_kernels.get_ops", none)
    monkeypatch.setattr(tune, "architecture", lambda device: 1 / 0)
    assert tune.main(["--out", str(tmp_path / "table.json"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "tune: backend 'triton': there is no GPU\n"
    assert not list(tmp_path.iterdir())
