"""The prediction: its bytes, its bounds, and that it never promises what cannot be."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench import predictions
from bench.machine_code import MACHINES
from bench.tools import results
from dia_fast.diagnostics.roofline import assumptions, figures, published, work
from dia_fast.diagnostics.roofline.devices import DEVICES, Device, named_like
from dia_fast.diagnostics.roofline.predict import STEPS_PER_SECOND, Workload, predict
from dia_fast.engine.decode_graphs import BUCKETS
from dia_fast.model.config import DiaConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DiaConfig()
DTYPES = ("bfloat16", "float16", "float32")

devices = st.builds(
    lambda base, units, bandwidth, clock, flops, cache, latency: replace(
        base, units=units, bandwidth=bandwidth, clock=clock, matrix=flops, vector=flops / 8,
        cache_bandwidth=cache * bandwidth, latency=latency,
    ),
    st.sampled_from(list(DEVICES.values())),
    st.integers(1, 500),
    st.floats(1e10, 1e14),
    st.floats(1e8, 1e10),
    st.floats(1e11, 1e16),
    st.floats(1, 50),
    st.floats(1e-9, 1e-5),
)  # fmt: skip
workloads = st.builds(
    Workload,
    st.just(CONFIG),
    st.sampled_from(DTYPES),
    st.integers(1, 32),
    st.integers(1, 3072),
    st.integers(1, 1024),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(work.IN_8_BITS)),
)


def usual(**changes: object) -> Workload:
    return replace(Workload(CONFIG, "bfloat16", 1, 860, 200), **changes)  # type: ignore[arg-type]


def test_bytes_at_full_size_are_those_that_were_counted() -> None:
    """`bench/traffic.json` has what the meter counted at the shapes of Dia-1.6B."""
    steps: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for counted in results.flat(results.read(ROOT / "bench" / "traffic.json")):
        steps.setdefault((counted["rows"], counted["context"]), []).append(counted)
    assert sorted(steps) == [(rows, context) for rows in (1, 2, 8) for context in (64, 1024, 3072)]
    names = {1: ["self_attention"], 11: list(work.LAUNCHES)}
    # The meter takes the rule of no particular GPU.
    tiles = work.Tiles(lambda name, count: 16, work.SELF_SPLIT, work.split(128, 2, "none", work.CROSS_SPLIT), False)
    for (rows, context), lines in steps.items():
        batch = max(rows // 2, 1)
        step = work.Step(batch, context, 256, 2, rows > 1, batch, 3073, 256, mixes=False)
        found = {item.name: item for item in work.launches(CONFIG, step, tiles)}
        for name, counted in zip(names[len(lines)], lines, strict=True):
            item, other, again = found[name], counted["other"], counted["again"]
            assert (item.kernel, item.weights, item.kv) == (counted["kernel"], counted["weights"], counted["kv"]), name
            if name == "embed":  # the meter's slots all choose the same codes
                assert item.other + item.again == other + again
            else:
                assert (item.other, item.again) == (other, again), name


def test_a_step_is_its_launches() -> None:
    made = predict(DEVICES["h100"], usual())
    assert made.launches == 8 * 18 + 3
    assert made.gpu.low == pytest.approx(sum(line.each.low * line.work.times for line in made.lines))
    assert made.gpu.high == pytest.approx(sum(line.each.high * line.work.times for line in made.lines))
    assert published.weight_bytes(CONFIG, 2) == 2 * 1_264_656_384 == sum(
        line.work.weights * line.work.times for line in made.lines
    )  # fmt: skip


@given(device=devices, workload=workloads)
def test_nothing_is_faster_than_the_published_figures_allow(device: Device, workload: Workload) -> None:
    made = predict(device, workload)
    size = workload.step.itemsize
    assert made.ceiling <= made.step.low <= made.step.high
    for line in made.lines:
        assert 0 < line.each.low <= line.each.high
        assert line.work.streamed / device.bandwidth <= line.each.low
        assert line.work.flops / device.peak(size) <= line.each.low
        assert line.work.active <= line.work.programs
        assert all(0 <= part.low <= part.high for part in line.parts.values())


# Its launches in front just fill the GPU, where one program of each SM ends first as well as in several waves.
FULL = replace(
    DEVICES["5090"], units=288, bandwidth=2.077e12, clock=1.613e9, matrix=8.2e13, vector=1.025e13,
    cache_bandwidth=1.0387e14, latency=1.809e-6,
)  # fmt: skip


@example(device=FULL, workload=Workload(CONFIG, "bfloat16", 9, 2049, 129, guided=False), context=2049, text=257)
@given(device=devices, workload=workloads, context=st.integers(1, 3072), text=st.integers(1, 1024))
def test_more_context_or_text_is_never_faster(device: Device, workload: Workload, context: int, text: int) -> None:
    more = replace(workload, context=max(workload.context, context), text=max(workload.text, text))
    less = replace(workload, context=min(workload.context, context), text=min(workload.text, text))
    one, other = predict(device, less), predict(device, more)
    assert one.step.low <= other.step.low * (1 + 1e-12) and one.step.high <= other.step.high * (1 + 1e-12)
    assert one.ceiling <= other.ceiling


@given(workload=workloads, device=devices, factor=st.floats(1, 10))
def test_a_better_device_is_never_slower(workload: Workload, device: Device, factor: float) -> None:
    before = predict(device, workload).step
    for field in ("bandwidth", "clock", "matrix", "vector", "cache_bandwidth"):
        after = predict(replace(device, **{field: getattr(device, field) * factor}), workload).step
        assert after.low <= before.low * (1 + 1e-12) and after.high <= before.high * (1 + 1e-12), field
    quicker = predict(replace(device, latency=device.latency / factor), workload).step
    assert quicker.high <= before.high * (1 + 1e-12)


def test_what_limits_a_launch_is_named() -> None:
    device = DEVICES["h100"]

    def bound(device: Device, name: str = "gate_up", **changes: object) -> str:
        return next(line.bound for line in predict(device, usual(**changes)).lines if line.work.name == name)

    assert bound(device) == "memory"
    assert bound(replace(device, latency=60e-6)) == "flight"
    assert bound(replace(device, clock=1e8)) == "issue"
    assert bound(replace(device, cache_bandwidth=device.bandwidth)) == "cache"
    assert bound(replace(device, matrix=1e12), requests=32) == "compute"
    assert bound(device, "sample") == "serial"
    assert bound(replace(device, bandwidth=1e15, cache_bandwidth=1e16, latency=1e-9, clock=1e11), "o") == "gap"
    assert bound(replace(device, units=2, bandwidth=1e15, cache_bandwidth=1e16, clock=1e11), "cross_attention",
                 requests=32, text=1) == "turns"  # fmt: skip


def test_littles_law_program_by_program() -> None:
    """A program whose loads all fit on their way at once waits one latency; one with more, that many times as long."""
    device = DEVICES["h100"]
    found = figures.load("sm_90", "bfloat16")
    lines = {line.work.name: line for line in predict(device, usual()).lines}
    assert found.find("o", 2).in_flight == 8 * 2048 * 2
    assert lines["o"].parts["flight"].low == pytest.approx(device.latency)
    down = found.find("down", 2)
    assert lines["down"].parts["flight"].low == pytest.approx(down.block * 8192 * 2 / down.in_flight * device.latency)
    wide = found.find("gate_up", 2)
    waves, times = (
        lines["gate_up"].work.programs / (wide.resident * device.units),
        wide.block * 2048 * 2 / wide.in_flight,
    )
    assert waves > 1 and lines["gate_up"].parts["flight"].low == pytest.approx(waves * times * device.latency)


def test_launch_by_launch_the_host_decides() -> None:
    made = predict(DEVICES["h100"], usual())
    bare = predict(DEVICES["h100"], usual(graph=False))
    assert bare.host.low == pytest.approx(147 * assumptions.HOST_LAUNCH.best)
    assert bare.step == bare.host and bare.step.low > made.step.low


def test_requests_are_padded_to_the_graph_that_holds_them() -> None:
    made = predict(DEVICES["h100"], usual(requests=5))
    assert made.workload.step.padded == 8 and any("graph for 8" in note for note in made.notes)
    assert usual(requests=5, graph=False).step.padded == 5
    assert all(usual(requests=count).step.padded == count for count in BUCKETS)
    # The padding's rows are computed, and nobody's keys are read for it.
    whole = predict(DEVICES["h100"], usual(requests=8))
    assert made.streamed() < whole.streamed()
    assert [line.work.rows for line in made.lines] == [line.work.rows for line in whole.lines]


def test_published_results_stand_beside_the_ceilings() -> None:
    """Ceilings as published with the results; none is above its own or, compiled, far from what kernels could do."""
    found = published.compare(860, 200)
    rates = {(item.result.device, item.result.dtype): item.ceiling for item in found}
    assert [round(rates[key]) for key in (("h100", "bfloat16"), ("a100", "float16"), ("4090", "bfloat16"))] == [
        1324, 806, 399,
    ]  # fmt: skip
    assert all(item.share < 0.58 for item in found)
    for item in found:
        # The predicted kernels are not those that were measured; they should not be slower.
        assert item.result.steps_per_second < 1 / item.predicted.step.high
    assert pytest.approx(86.13, abs=0.01) == STEPS_PER_SECOND


def test_devices_agree_with_the_machines_of_the_codegen_report() -> None:
    for target, machine in MACHINES.items():
        twins = [
            device for device in DEVICES.values() if device.target == target and device.bandwidth == machine.bandwidth
        ]
        assert twins, f"no device for {machine.name}"
        assert {twin.units for twin in twins} == {machine.units}
        assert {(twin.warp_size, twin.issue) for twin in twins} == {(machine.lanes, machine.issue)}


def test_devices_are_plausible() -> None:
    for key, device in DEVICES.items():
        assert device.key == key and device.target in MACHINES
        assert device.cache_bandwidth > device.bandwidth and device.matrix > device.vector
        # Vector units do two operations per clock on each of 64 to 256 lanes of a unit.
        assert 64 <= device.vector / (2 * device.units * device.clock) <= 520, key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA GeForce RTX 4090", "4090"), ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA H200", "h200"), ("AMD Instinct MI300X", "mi300x"),
        ("AMD Radeon RX 7900 XTX", "7900xtx"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Tesla T4", None),
        ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 NVL", None),
        ("NVIDIA A100 80GB PCIe", None), ("", None),
    ],
)  # fmt: skip
def test_a_drivers_name_is_recognised_or_not_guessed(name: str, key: str | None) -> None:
    assert named_like(name) == (DEVICES[key] if key else None)


def test_the_published_table_is_what_is_predicted() -> None:
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\w+)( `int8`)? \| ([\d. |-]+) \|$", text, re.M)
    assert sum(not narrow for _, narrow, _ in lines) >= 5 and sum(bool(narrow) for _, narrow, _ in lines) >= 5
    for key, narrow, cells in lines:
        expected = []
        for requests, digits in ((1, 1), (16, 0)):
            made = predict(DEVICES[key], usual(requests=requests, weights="int8" if narrow else "float"))
            times = requests / STEPS_PER_SECOND
            expected += [
                f"{made.step.low * 1e3:.2f} - {made.step.high * 1e3:.2f}",
                f"{times / made.step.high:.{digits}f} - {times / made.step.low:.{digits}f}",
                f"{times / made.ceiling:.{digits}f}",
            ]
        assert cells.split(" | ") == expected, key


def test_the_steps_that_were_measured_lie_within_their_predictions() -> None:
    """By today's kernels; those of 8 and 32 requests, measured by earlier ones, were slower if anything."""
    known = predictions.measured()
    assert sorted(known) == [("h200", 1), ("h200", 8), ("h200", 32)]
    for (key, requests), milliseconds in known.items():
        step = predict(DEVICES[key], usual(requests=requests)).step
        assert step.low * 1e3 <= milliseconds <= step.high * 1e3, requests
        # A prediction that spans everything would be right, and of no use.
        assert step.high / step.low < (1.5 if requests == 1 else 1.8)


def test_weights_of_programs_with_room_beside_the_launch_in_front_arrive_before_it_ends() -> None:
    device = replace(DEVICES["h200"], cache_bandwidth=1e14)  # so that memory decides
    lines = {line.work.name: line for line in predict(device, usual()).lines}
    for name, room in (("o", True), ("cross_o", True), ("down", False)):
        line = lines[name]
        fixed = line.parts["gap"] + line.parts["serial"]
        hidden = fixed.high + line.parts["memory"].high - line.each.high
        assert (hidden > 0.5e-6) == room, name  # in whole programs per SM, down has none beside gate and up
        assert line.work.streamed / device.bandwidth <= line.each.low
    # No launch begins early here.
    old = {line.work.name: line for line in predict(DEVICES["a100"], usual()).lines}["o"]
    fixed = old.parts["gap"] + old.parts["serial"]
    assert old.each.low == pytest.approx(fixed.low + old.parts["memory"].low)
