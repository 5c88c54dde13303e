"""`dia-fast plan`: what it prints, the pictures, what it measures, and what it refuses."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_fast.checkpoint import loading as checkpoint
from dia_fast.cli import main
from dia_fast.diagnostics.roofline import devices, measure, work
from dia_fast.diagnostics.roofline.predict import Workload
from dia_fast.errors import InputError
from dia_fast.model.config import DiaConfig
from dia_kernels import launcher as launch
from tests.helpers.front import TINY, make_model
from tests.kernels import executor

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    def run(*options: str) -> dict[str, Any]:
        assert main(["plan", *options, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_the_report_says_that_it_is_a_prediction_and_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION, NOT A MEASUREMENT: NVIDIA H100 SXM 80GB\n")
    for name in work.LAUNCHES:
        assert re.search(rf"^  {name} +\w+ +[\w ]+? +\d+ +[\d.]+ +[\d.]+ +[\d.]+ - [\d.]+ +\d+ - \d+$", text, re.M), (
            name
        )
    assert "launches           147" in text and "bandwidth ceiling" in text
    assert "published for Dia-1.6B" in text and "1324" in text
    assumed = text[text.index("assumptions, best - worst") :]
    assert assumed.count("assumed") >= 8 and assumed.count("measured on an H200") >= 8
    assert main(["plan", "--gpu", "4090"]) == 0
    other = capsys.readouterr().out
    assert other[other.index("assumptions, best - worst") :].count("assumed") >= 16
    assert "nothing that a step streams is still in the cache" in assumed
    assert "measured us each" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_data_for_programs_agrees_with_itself(plan: Plan) -> None:
    found = plan("--gpu", "a100", "--dtype", "fp16", "--batch", "3", "--context", "100", "--text", "64")
    assert found["kind"] == "prediction, not a measurement" and found["codegen"]["dtype"] == "float16"
    assert found["workload"] | {"config": None} == {
        "dtype": "float16", "requests": 3, "rows": 8, "context": 100, "text": 64, "guidance": True, "graph": True,
        "weights": "float", "config": None,
    }  # fmt: skip
    step = found["step"]
    assert step["launches"] == sum(item["times"] for item in found["launches"]) == 147
    assert step["gpu_seconds"]["low"] == pytest.approx(
        sum(item["times"] * item["seconds"]["low"] for item in found["launches"])
    )
    assert step["share_of_ceiling"][1] == pytest.approx(step["ceiling_seconds"] / step["seconds"]["low"])
    assert step["realtime_of_all_requests"][0] == pytest.approx(3 * step["realtime"][0])
    assert found["step_without_graph"]["seconds"]["low"] > step["seconds"]["low"]
    assert len(found["published"]) == 6 and "measured" not in found
    assert any("run in the graph for 4" in note for note in found["notes"])


@pytest.mark.parametrize("weights", ["int8", "int8-mlp"])
def test_weights_in_8_bits_are_predicted_by_their_bytes_and_their_code(
    weights: str, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    found, before = plan("--gpu", "h100", "--weights", weights), plan("--gpu", "h100")
    assert found["workload"]["weights"] == weights and before["workload"]["weights"] == "float"
    share = found["step"]["streamed_bytes"] / before["step"]["streamed_bytes"]
    assert share == pytest.approx({"int8": 0.51, "int8-mlp": 0.64}[weights], abs=0.01)
    assert found["step"]["seconds"]["low"] < before["step"]["seconds"]["low"]
    for item, other in zip(found["launches"], before["launches"], strict=True):
        narrow = item["name"] in work.IN_8_BITS[weights]
        assert (item["weight_bytes"] < other["weight_bytes"]) == narrow
        if not narrow:  # the same code does the same
            assert item["parts"]["issue"] == other["parts"]["issue"]
    assert any(note.startswith("memory: ") for note in found["notes"])
    assert main(["plan", "--gpu", "h100", "--weights", weights]) == 0
    assert f"bfloat16, weights {weights}, 1 request" in capsys.readouterr().out


def test_rows_count_both_rows_of_a_dialogue(plan: Plan) -> None:
    assert plan("--gpu", "h100", "--rows", "8")["workload"]["requests"] == 4
    alone = plan("--gpu", "h100", "--rows", "1", "--no-guidance", "--no-graph")
    assert (alone["workload"]["requests"], alone["workload"]["rows"], alone["workload"]["graph"]) == (1, 1, False)
    assert "step_with_graph" in alone


def test_another_model(plan: Plan, tmp_path: Path) -> None:
    found = plan("--gpu", "4090", "--model", str(make_model(tmp_path / "model")), "--context", "200")
    assert found["workload"]["config"]["decoder"]["hidden_size"] == 32 and found["step"]["launches"] == 8 + 3
    assert any("fits the cache" in note for note in found["notes"])
    assert any("those of Dia-1.6B's shapes" in note for note in found["notes"])


def test_what_does_not_fit_or_was_not_compiled_is_noted(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"like": "4090", "memory_gb": 3, "name": "small one", "target": "sm_75"}))
    found = plan("--gpu", str(path))
    assert found["device"]["name"] == "small one" and found["device"]["key"] == "custom"
    assert any(note.startswith("it does not fit: ") for note in found["notes"])
    assert any("no kernels were compiled for sm_75" in note for note in found["notes"])


WHOLE = {
    "target": "sm_90", "units": 100, "bandwidth_gbs": 1000, "clock_ghz": 1.5, "tflops_16bit": 100, "tflops_fp32": 20,
    "cache_mb": 40, "memory_gb": 24,
}  # fmt: skip


def test_a_device_of_ones_own(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(WHOLE))
    device = plan("--gpu", str(path))["device"]
    assert (device["name"], device["units"], device["bandwidth"], device["clock"]) == ("mine", 100, 1e12, 1.5e9)
    assert device["source"] == "mine.json, not checked" and device["cache_bandwidth"] == 2.5e12


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"units": 0}, "units must be a positive number below 1e9, not 0"),
        ({"bandwidth_gbs": -1}, "bandwidth_gbs must be a positive number"),
        ({"bandwidth_gbs": True}, "bandwidth_gbs must be a positive number"),
        ({"clock_ghz": "fast"}, "clock_ghz must be a positive number below 1e9, not 'fast'"),
        ({"clock_ghz": float("nan")}, "clock_ghz must be a positive number"),
        ({"units": 1.5}, "units must be a whole number, not 1.5"),
        ({"memory_gb": None}, "memory_gb must be"),
        ({"target": "hopper"}, "target must look like sm_90 or gfx942, not 'hopper'"),
        ({"target": 90}, "target must be a text, not 90"),
        ({"bandwith_gbs": 1}, "unknown field 'bandwith_gbs'; did you mean bandwidth_gbs?"),
        ({"cache_gbs": 999}, "cache_gbs (999) is below bandwidth_gbs (1000)"),
        ({"like": "h10"}, "no device is called 'h10'. Did you mean h100?"),
        ({"like": "other.json"}, "like must name one of"),
        ({"like": "x" * 5000}, "no device is called 'xxx"),
    ],
)
def test_fields_that_cannot_be_are_named(
    content: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(WHOLE | content))
    assert main(["plan", "--gpu", str(path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "3", '"h100"', "{", "[" * 100_000, "\x00", '{"units": 1}'])
def test_files_that_are_no_device_are_refused_in_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert main(["plan", "--gpu", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@given(
    st.dictionaries(
        st.sampled_from([*WHOLE, "like", "name", "cache_gbs", "latency_ns", "other"]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())),
    )
)
def test_any_object_gives_a_device_or_an_error_that_helps(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "device.json"
    path.write_text(json.dumps(WHOLE | content))
    try:
        device = devices.read(path)
    except InputError as error:
        assert str(error).startswith("--gpu: ")
    else:
        assert device.bandwidth > 0 and device.units >= 1 and device.cache_bandwidth >= device.bandwidth


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "h1000"], "Did you mean h100?"),
        (["--gpu", "banana"], "no device is called 'banana'. There are h100, "),
        (["--gpu", "missing.json"], "cannot read missing.json: No such file"),
        ([], "--gpu is missing: name one of h100, "),
        (["--gpu", "h100", "--rows", "65"], "--rows must be from 1 to 64, the most that one launch takes, not 65"),
        (["--gpu", "h100", "--rows", "0"], "--rows must be from 1 to 64"),
        (["--gpu", "h100", "--rows", "3"], "it must be even; or add --no-guidance"),
        (["--gpu", "h100", "--rows", "64", "--no-guidance"], "--rows 64: a step serves 1 to 32 dialogues"),
        (["--gpu", "h100", "--batch", "33"], "--batch 33: a step serves 1 to 32 dialogues"),
        (["--gpu", "h100", "--batch", "-1"], "--batch -1"),
        (["--gpu", "h100", "--context", "3073"], "--context must be from 1 to 3072 for this model, not 3073"),
        (["--gpu", "h100", "--text", "0"], "--text must be from 1 to 1024 for this model, not 0"),
        (["--gpu", "h100", "--model", "missing-folder"], "missing-folder"),
        (["--gpu", "h100", "--device", "cuda"], "it goes with --measure"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *options]) == 2
    caught = capsys.readouterr()
    assert said in caught.err and caught.err.count("\n") == 1 and not caught.out


@pytest.mark.parametrize("options", [["--dtype", "int8"], ["--batch", "2", "--rows", "4"], ["--context", "long"]])
def test_argparse_refuses_the_rest(options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--gpu", "h100", *options])
    assert caught.value.code == 2


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in devices.DEVICES) and "--measure" in text and "examples:" in text


def test_pictures(plan: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    found = plan("--gpu", "h100", "--plots", str(tmp_path / "pictures"))
    names = {Path(path).name for path in found["plots"]}
    assert names == {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"{name}-{theme}.{kind}"
        for name in ("roofline", "kernels", "latency", "throughput")
        for theme in ("light", "dark")
        for kind in ("png", "svg")
    }  # fmt: skip


def test_without_matplotlib_only_pictures_are_refused(
    plan: Plan, without_matplotlib: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan("--gpu", "h100")
    assert main(["plan", "--gpu", "h100", "--plots", str(tmp_path / "pictures")]) == 2
    assert "pip install 'dia-fast[plots]'" in capsys.readouterr().err and not (tmp_path / "pictures").exists()


class FakeTimer:
    """A device on which a launch takes as many microseconds as its kernel's name has letters, and is not run."""

    device = executor.device()

    def __init__(self, name: str = "NVIDIA H100 80GB HBM3") -> None:
        self.name, self.now, self.captured = name, 0.0, 0

    def capture(self, work: measure.Work) -> measure.Work:
        self.captured += 1
        work()
        return work

    def seconds(self, work: measure.Work) -> float:
        work()
        before = self.now
        work()
        return self.now - before

    def note(self, run: launch.Launcher, kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        self.now += self.cost(kernel.fn.__name__)

    @staticmethod
    def cost(kernel: str) -> float:
        return 1e-6 * len(kernel.lstrip("_"))


needs_kernels = pytest.mark.skipif(not executor.interpreted(), reason="the fake device stands in for a CPU's kernels")


@needs_kernels
@pytest.mark.parametrize(("requests", "graph", "layers"), [(1, True, 1), (3, False, 11)])
def test_measuring_times_every_launch_and_whole_steps(requests: int, graph: bool, layers: int) -> None:
    timer, config = FakeTimer(), replace(TINY, decoder=replace(TINY.decoder, num_hidden_layers=layers))
    with launch.listening(timer.note):
        found = measure.measure(Workload(config, "float32", requests, 100, 20, True, graph), timer, rounds=2)
    costs = {name: timer.cost(work.KERNELS[name]) for name in work.LAUNCHES}
    assert found["launches"] == pytest.approx(costs)
    inside = sum(cost for name, cost in costs.items() if name not in ("embed", "heads", "sample"))
    outside = costs["embed"] + costs["heads"] + costs["sample"]
    assert found["step_seconds"] == pytest.approx(layers * inside + outside)
    assert found["step_contexts"][0] <= 100 <= found["step_contexts"][1] and found["weights"] == "random"
    # Every launch has a graph of its own; the engine captures its steps only where it is asked to.
    assert (timer.captured > len(work.LAUNCHES)) == graph


@needs_kernels
def test_weights_in_8_bits_are_measured(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[torch.dtype] = set()

    def note(run: launch.Launcher, kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        launched.update(item.dtype for item in args if isinstance(item, torch.Tensor))
        timer.note(run, kernel, grid, args, meta)

    timer = FakeTimer()
    monkeypatch.setattr(measure, "gpu_timer", lambda device: timer)
    with launch.listening(note):
        found = measure.measure(Workload(TINY, "float32", 1, 60, 20, weights="int8"), timer, rounds=1)
        assert torch.int8 in launched and found["weights"] == "random"
        stored = plan("--measure", "--model", str(make_model(tmp_path / "model")), "--weights", "int8-mlp",
                      "--context", "60", "--text", "20")  # fmt: skip
    assert stored["workload"]["weights"] == "int8-mlp"


@needs_kernels
def test_measured_stands_beside_predicted(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timer = FakeTimer()
    monkeypatch.setattr(measure, "gpu_timer", lambda device: timer)
    model = str(make_model(tmp_path / "model"))
    options = ["--measure", "--model", model, "--context", "60", "--text", "20", "--dtype", "fp32"]
    with launch.listening(timer.note):
        found = plan(*options)
        assert found["device"]["key"] == "h100" and found["measured"]["device"] == timer.name
        assert main(["plan", *options, "--gpu", "4090"]) == 0
    text = capsys.readouterr().out
    assert "measured us each" in text and re.search(r"^  measured +\d+\.\d+ ms, \d+ steps per second", text, re.M)
    assert "predicted for NVIDIA GeForce RTX 4090, measured on NVIDIA H100 80GB HBM3" in text
    assert re.search(r"^  qkv .* 15\.0$", text, re.M), "rms_norm_linear has 15 letters"


@pytest.fixture
def measured_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let `--measure` find a GPU of a name, and 7 us for every launch at once."""

    def find(name: str) -> None:
        monkeypatch.setattr(measure, "gpu_timer", lambda device: FakeTimer(name))
        found = {"device": name, "launches": dict.fromkeys(work.LAUNCHES, 7e-6), "step_seconds": 2e-3}
        monkeypatch.setattr(measure, "measure", lambda workload, timer, checkpoint: found)

    return find


def test_a_gpu_without_published_figures_is_measured_alone_and_not_guessed(
    plan: Plan, measured_at_once: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_at_once("Tesla T4")
    found = plan("--measure")
    assert found["kind"] == "measurement" and found["measured"]["launches"]["qkv"] == 7e-6
    assert found["workload"]["rows"] == 2 and not {"step", "launches", "device"} & set(found)
    assert found["notes"][0].startswith("no prediction stands beside it: Tesla T4 has no published figures here")
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert main(["plan", "--measure", "--plots", str(tmp_path / "pictures")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("MEASURED, WITHOUT A PREDICTION: Tesla T4\nbfloat16, 1 request (2 rows, guidance), ")
    assert (
        re.search(r"^  qkv +rms_norm_linear +7\.0$", text, re.M) and "  2.000 ms, 500 steps per second, 5.8 x" in text
    )
    assert "no pictures were drawn" in text and not (tmp_path / "pictures").exists()


def test_a_named_gpu_is_predicted_whatever_is_here(plan: Plan, measured_at_once: Callable[[str], None]) -> None:
    measured_at_once("Tesla T4")
    found = plan("--measure", "--gpu", "l4")
    assert found["device"]["key"] == "l4" and found["measured"]["device"] == "Tesla T4"
    assert "predicted for NVIDIA L4, measured on Tesla T4" in found["notes"]


def test_the_first_gpu_is_measured_on_if_none_is_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []

    def set_device(device: torch.device) -> None:
        if device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got: {device}")  # as torch does
        current.append(device.index)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    timers = [measure.GpuTimer(torch.device(name)) for name in ("cuda", "cuda:1")]
    assert current == [0, 1] and [str(timer.device) for timer in timers] == ["cuda:0", "cuda:1"]


def test_the_weights_that_are_measured_are_those_that_were_asked_for(
    plan: Plan, measured_at_once: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = []
    local = checkpoint.open_checkpoint(make_model(tmp_path / "model"))

    def open_checkpoint(name: str, **options: Any) -> checkpoint.Checkpoint:
        opened.append((name, options))
        return local

    measured_at_once("NVIDIA L4")
    used = []
    known = measure.measure
    monkeypatch.setattr(checkpoint, "open_checkpoint", open_checkpoint)
    monkeypatch.setattr(measure, "measure", lambda *given: used.append(given[2]) or known(*given))
    options = ["--context", "60", "--text", "20", "--revision", "v2", "--offline"]
    plan("--measure", "--model", "somebody/dia", *options)
    assert opened == [("somebody/dia", {"revision": "v2", "local_files_only": True})] and used == [local]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_measuring_without_a_gpu_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "h100", "--measure"]) == 2
    error = capsys.readouterr().err
    assert "--measure needs a GPU that torch can use" in error and torch.__version__ in error


def test_a_model_too_short_to_time_is_refused() -> None:
    short = DiaConfig(TINY.encoder, TINY.decoder)
    with pytest.raises(InputError, match="800 steps are timed, and this model ends after 200"):
        measure._steps(_Model(short), Workload(short, "float32", 1, 10, 5), FakeTimer(), 99)  # type: ignore[arg-type]


class _Model:
    def __init__(self, config: DiaConfig) -> None:
        self.config = config
