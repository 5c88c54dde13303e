"""Every benchmark writes JSON of one schema and CSV; two such files can be compared.

Each runs at a tiny size, or on stand-ins for what takes long or needs a GPU.
"""

import contextlib
import csv
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="some benchmarks are about Triton kernels")

from bench import codegen, compare, occupancy, parity, row_bits, traffic
from bench.baseline import Group, Kind
from bench.baseline import write as write_baseline
from bench.device import Device
from bench.tools import results
from bench.tools.results import Results, fault, read
from bench.tools.tiny_models import make_transformers_checkpoint, tiny_config
from dia_fast.audio.codec import CodecConfig
from dia_fast.diagnostics.doctor import random_model
from dia_fast.diagnostics.roofline import figures
from dia_fast.errors import InputError
from dia_fast.jobs.runner import speak_items
from dia_kernels import reference
from tests.helpers.front import TINY

BENCH = Path(results.__file__).parents[1]
# Modules of bench with a command line that measure nothing.
TOOLS = {
    "compare", "published", "configs", "environment", "figures", "make_checkpoint", "metrics", "plots", "readme",
    "gpu",  # whose parts write theirs
    "sanitizer",  # which shows what another program says
}  # fmt: skip
MEASURING = sorted(
    {path.stem for path in BENCH.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    | {path.parent.name for path in BENCH.glob("*/__main__.py")} - TOOLS
)  # fmt: skip
MEASURING = [name for name in MEASURING if name not in TOOLS]


def module(name: str) -> Any:
    return importlib.import_module(f"bench.{name}" + (".__main__" if (BENCH / name).is_dir() else ""))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a tiny model."""
    folder = make_transformers_checkpoint(tmp_path_factory.mktemp("results") / "model", tiny_config())
    return ["--model", str(folder), "--dtype", "float32", "--text", "9", "--device", "cpu"]


class Place:
    """Stand-ins of one run."""

    def __init__(self, patch: pytest.MonkeyPatch, model: list[str], folder: Path) -> None:
        self.patch, self.model, self.folder = patch, model, folder

    def put(self, name: str, **stand_ins: Any) -> None:
        for attribute, value in stand_ins.items():
            self.patch.setattr(module(name), attribute, value)


def of_pages(place: Place) -> list[str]:
    place.put("pages", narrow_config=lambda: tiny_config({"max_position_embeddings": 256}))
    return ["--rows", "40", "--every", "16", "--dtype", "float32"]


def of_dropin(place: Place) -> list[str]:
    sides = {name: lambda: None for name in ("engine", "accelerate")}
    place.put("dropin", load=lambda *_: None, sides=lambda *_: sides)
    return ["--rounds", "1"]


def of_stream_parity(place: Place) -> list[str]:
    place.put("stream_parity", CodecConfig=lambda: CodecConfig(decoder_hidden_size=32))
    return ["--frames", "6", "--chunks", "3", "2"]


def of_threads(place: Place) -> list[str]:
    place.put("threads", busy=lambda processes: contextlib.nullcontext())
    return ["--threads", "1", "--steps", "1", "--layers", "1", "--widths", "128"]


def of_original(place: Place) -> list[str]:
    made = random_model(TINY, reference, torch.float32, torch.device("cpu"))
    theirs = SimpleNamespace(generate=lambda *a, **more: None)
    place.put("original", load_original=lambda options: theirs, load=lambda options: (made, None))
    return ["--model", "none", "--device", "cpu", "--steps", "2", "--rounds", "1"]


def of_row_bits(place: Place) -> list[str]:
    def step(target: str, dtype: torch.dtype, rows: int, *more: Any) -> dict[Any, Any]:
        return {("_glu", 8, 4): SimpleNamespace(arguments={"x_ptr": [0] * rows})}

    place.put("row_bits", step=step, run=lambda compiled: row_bits.Result({(0, 0): (1, 1)}, 0.5))
    return ["--targets", "sm_90", "--dtypes", "bfloat16", "--rows", "1", "2"]


def of_ordering(place: Place) -> list[str]:
    place.put("ordering", cases=lambda: [SimpleNamespace(name="one")], problems=lambda *_: [])
    return []


def of_codegen(place: Place) -> list[str]:
    def report(targets: Any, rows: Any, dtypes: Any, progress: bool, steps: list[Any], *more: Any) -> Iterator[Any]:
        steps.append(occupancy.Neighbours("sm_90", "bfloat16", 2, (occupancy.Pair("a", "b", 3, 2, 9.0),)))
        yield codegen.Line("sm_90", "bfloat16", 2, "sample", 9, 4, 99, 0, 0, 0.5, 0, {"HMMA": 3}, 700, 0.0, 0.0)

    place.put("codegen", report=report)
    return ["--markdown", str(place.folder / "tables.md"), "--targets", "sm_90", "--dtypes", "bfloat16"]


def of_traffic(place: Place) -> list[str]:
    place.put("traffic", install=lambda: None, measure=lambda *_: [traffic.Traffic(1, 64, "k", 5, 0, 1, 0, 6, True)])
    return ["--rows", "1", "--contexts", "64"]


def of_ablation(place: Place) -> list[str]:
    place.put(
        "ablation", open_device=lambda name: Device(torch.device("cpu")), get_ops=lambda *_: reference,
        read_bandwidth=lambda *_: 1e9, random_model=lambda *_: SimpleNamespace(ops=reference),
        bytes_per_step=lambda *_: 8, state_for=lambda *_: None, _seconds=lambda *_: 2.0,
    )  # fmt: skip
    return []


def of_residency(place: Place) -> list[str]:
    gpu = SimpleNamespace(torch=torch.device("cuda"), name="a GPU")
    found = {"ahead": 1, "starts_us": [(-2.0, -1.0), (1.0, 2.0)]}
    place.put("residency", open_device=lambda name: gpu, measure=lambda *_: found, QuickCapture=lambda: None)
    place.patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    place.patch.setattr(results, "collect", lambda device: {"device": "a GPU", "commit": "", "torch": "2"})
    return []


def of_tune(place: Place) -> list[str]:
    trials = [{"rows": 2, "launch": "o", "use": {"BLOCK_N": 8}, "seconds": 1.0}, {"rows": 2, "launch": "all"}]
    device = Device(torch.device("cpu"))
    tuner = SimpleNamespace(trials=trials, device=device, run=lambda: None, entries=list)
    place.put("tune", Tuner=lambda *_: tuner)
    return ["--out", str(place.folder / "table.json"), "--workers", "0"]


def of_parity(place: Place) -> list[str]:
    place.put("parity", check=lambda *_: [parity.Finding("float32", "graphs", "ok", "the same codes")])
    return ["--device", "cpu", "--backend", "torch", "--dtypes", "fp32"]


def of_serving_http(place: Place) -> list[str]:
    async def measure(options: Any) -> tuple[dict[str, Any], list[str]]:
        return {"server, seconds a request": {"wall": 1.0}, "requests": {"finished": 3}}, []

    place.put("serving_http", measure=measure)
    return ["--streams", "1", "--", "--threads", "1"]


def of_ray_cost(place: Place) -> list[str]:
    def speak_on_ray(items: Any, load: Any, options: Any, begun: Callable[[], None]) -> Iterator[Any]:
        begun()
        with load() as dia:
            yield from speak_items(dia, items)

    place.put("ray_cost", speak_on_ray=speak_on_ray)
    return ["--device", "cpu", "--items", "2", "--rounds", "1", "--least", "0.1"]


def of_check(place: Place) -> list[str]:
    group = Group({"moved": Kind("bytes", "lower", 0.1, 1.0, "made up")}, {"first": {"moved": 100.0}})
    baseline = place.folder / "baseline.json"
    write_baseline(baseline, {"traffic": group})
    place.put("check", _measured=lambda *_: group)
    return ["--only", "traffic", "--baseline", str(baseline)]


def of_suite(place: Place) -> list[str]:
    def run(arguments: list[str]) -> int:
        saved, verdicts = (
            next(Path(item.partition("=")[2]) for item in arguments if item.startswith(flag))
            for flag in ("--benchmark-json=", "--bench-verdicts=")
        )
        facts = {"backend": "torch", "op": "glu", "bytes": 8, "operations": 2, "share_of_bandwidth": 0.5,
                 "share_of_compute": 0.1, "kind": "other", "cold": ["x"]}  # fmt: skip
        stats = {"median": 1.0, "iqr": 0.1, "min": 0.9, "rounds": 5}
        machine = {"device": "d", "torch": "t", "triton": "t", "dtype": "d", "size": "s", "vectors": "some",
                   "measured": {"bandwidth": 1.0, "compute": 1.0}}  # fmt: skip
        timed = [{"group": "glu, 2 rows", "extra_info": facts, "stats": stats}]
        saved.write_text(json.dumps({"benchmarks": timed, "machine_info": machine}))
        skipped = {"group": "glu, 2 rows", "backend": "triton", "outcome": "skipped", "detail": "no GPU"}
        verdicts.write_text(json.dumps([skipped]))
        return 0

    place.patch.setattr(pytest, "main", run)
    place.put("suite", draw=lambda *_: None)
    return ["--device", "cpu", "--out", str(place.folder / "suite")]


def of_wrappers(place: Place) -> list[str]:
    place.put(
        "wrappers", drive=lambda *_: None, make=lambda *_: {"PYTHONPATH": ""}, sounds=lambda *_: {"generate": [[1, 2]]},
        compare=lambda *_: {"own": {"generate": "1 of 2"}, "mended": {}},
    )  # fmt: skip
    return ["pinokio=nowhere"]


def of_first_generation(place: Place) -> list[str]:
    figures = {"rows": 9, "codes": 5, "differ": 0, "ties": 0, "error": 1e-6, "margin": 0.1, "largest": 5.0}
    place.put(
        "first_generation", load=lambda *_: None, compare=lambda *_: figures, probabilities=lambda *_: 1e-7
    )  # fmt: skip
    return ["checkout", "--rows", "1"]


def of_predictions(place: Place) -> list[str]:
    place.put("predictions", compiled=lambda target, table: figures.load(target, "bfloat16"))
    table = place.folder / "table.json"
    table.write_text("{}")
    return ["--tables", str(table)]


RUNS: dict[str, Callable[[Place], Sequence[str]]] = {
    "ablation": of_ablation,
    "check": of_check,
    "codegen": of_codegen,
    "cpu_products": lambda place: ["--features", "64", "--hidden", "64", "--rounds", "1"],
    "cpu_ratios": lambda place: [*place.model[:2], "--text", "9", "--requests", "1", "--steps", "2", "--rounds", "1"],
    "decode_step": lambda place: [*place.model, "--steps", "3", "--rounds", "1"],
    "dropin": of_dropin,
    "first_generation": of_first_generation,
    "fleet": lambda place: ["--listeners", "50", "--horizon", "20"],
    "latency": lambda place: ["--device", "cpu", "--rounds", "1", "--steps", "24", "--chunks", "0.1"],
    "ordering": of_ordering,
    "original": of_original,
    "host_time": lambda place: ["--requests", "2", "--steps", "4", "--rounds", "2"],
    "long_sound": lambda place: ["--width", "32", "--frames", "70", "--device", "cpu"],
    "pages": of_pages,
    "parity": of_parity,
    "predictions": of_predictions,
    "ragged": lambda place: [*place.model, "--requests", "2", "--steps", "17", "20", "--gap", "0"],
    "ray_cost": of_ray_cost,
    "residency": of_residency,
    "resident_memory": lambda place: [*place.model[:2], "--steps", "2"],
    "row_bits": of_row_bits,
    "serving": lambda place: ["--device", "cpu", "--streams", "1", "--steps", "30"],
    "serving_http": of_serving_http,
    "stream_parity": of_stream_parity,
    "suite": of_suite,
    "threads": of_threads,
    "throughput": lambda place: [*place.model, "--requests", "1", "--steps", "2", "--rounds", "1"],
    "traffic": of_traffic,
    "tune": of_tune,
    "wrappers": of_wrappers,
}


@pytest.mark.parametrize("name", MEASURING)
def test_every_benchmark_writes_the_schema(
    name: str, model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, table = tmp_path / "out.json", tmp_path / "out.csv"
    written = ["--json", str(out), "--csv", str(table)]
    threads = torch.get_num_threads()
    with torch.inference_mode():
        status = module(name).main([*written, *RUNS[name](Place(monkeypatch, model, tmp_path))])
    torch.set_num_threads(threads)
    run = read(out)
    assert run["bench"] == name and run["status"] == status in (0, 1)  # 1: what is so small may be slower
    assert run["argv"][0] == "--json" and str(tmp_path) not in out.read_text()
    assert run["results"] and all(row["case"] for row in run["results"])
    assert run["versions"]["torch"] and len(run["table"]["sha256"]) == 64
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(run["results"])


@pytest.mark.parametrize("name", ["decode_step", "pages", "ordering"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    name: str, model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Results, "add", lambda *_: pytest.fail("something was measured"))
    given = RUNS[name](Place(monkeypatch, model, tmp_path))
    assert module(name).main([*given, "--json", str(tmp_path / "none" / "out.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def made(folder: Path, name: str, rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], status: int = 0) -> Path:
    """A file with these results, of a benchmark of that name."""
    path = folder / f"{len(list(folder.iterdir()))}.json"
    parser = results.argparse.ArgumentParser(prog=name)
    results.add_options(parser)
    with mock.patch.object(results, "collect", lambda device: {"device": "a CPU", "commit": "ab+", "torch": "2"}):
        run = Results(parser, parser.parse_args(["--json", str(path)]), [])
    run.extend(rows)
    if status == 0:
        run.end(0)
    return path


SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=4)
PARTS = st.dictionaries(st.text(max_size=4), SCALARS, max_size=3)


@given(st.lists(st.tuples(PARTS, PARTS), max_size=3))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("round")
    found = read(made(folder, "x", rows))["results"]
    finite = [
        [{k: None if isinstance(v, float) and v - v != 0 else v for k, v in part.items()} for part in row]
        for row in rows
    ]
    assert [[row["case"], row["values"]] for row in found] == finite


def test_a_value_that_is_no_scalar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="times must be a number"):
        made(tmp_path, "x", [({"a": 1}, {"times": [1.0]})])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "it has schema 2, and this version reads 1"),
        ({"dirty": 1}, "dirty is a int"),
        ({"table": {}}, "table must have name and sha256"),
        ({"results": [{"case": {}, "values": {"a": {}}}]}, r"results\[0\] must be flat"),
        ({"results": [{"case": {}}]}, r"results\[0\] must be flat"),
        ({"more": 1}, "its entries must be schema, bench"),
    ],
)
def test_another_file_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = made(tmp_path, "x", [({}, {})])
    assert fault(json.loads(path.read_text())) is None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said):
        read(path)


def test_two_runs_are_compared_by_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = made(tmp_path, "x", [({"n": 1}, {"ms": 2.0}), ({"n": 2}, {"ms": 4.0}), ({"n": 2}, {"ms": 5.0})])
    two = made(tmp_path, "x", [({"n": 2}, {"ms": 1.0}), ({"n": 2}, {"ms": 5.0}), ({"n": 3}, {"ms": 1.0})], status=1)
    two.write_text(json.dumps(json.loads(two.read_text()) | {"commit": "another"}))
    assert compare.main([str(one), str(two)]) == 0
    printed = capsys.readouterr().out
    assert "| n 2 | ms | 4 | 1 | 0.250 |" in printed and "| n 2, repeat 2 | ms | 5 | 5 | 1.000 |" in printed
    assert "only in A: n 1" in printed and "only in B: n 3" in printed
    assert "| another" in printed and "B was broken off" in printed
    assert compare.main([str(one), str(two), "--changed", "1"]) == 0
    assert "repeat 2" not in capsys.readouterr().out


def test_runs_of_different_benchmarks_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = made(tmp_path, "x", []), made(tmp_path, "bench.y", [])
    assert compare.main([str(one), str(two)]) == 2
    assert "of y: nothing to compare" in capsys.readouterr().err
    assert compare.main([str(one), str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
