"""A prediction as text for people and as data for programs. Both say that it is one, and what it assumes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dia_fast.diagnostics.roofline.assumptions import ASSUMPTIONS, STATEMENTS, Assumption
from dia_fast.diagnostics.roofline.predict import STEPS_PER_SECOND, Prediction, Range, Workload
from dia_fast.diagnostics.roofline.published import Comparison
from dia_fast.diagnostics.roofline.work import KERNELS, LAUNCHES
from dia_fast.model.quantization import FLOAT

LABEL = "prediction, not a measurement"
PARTS = {
    "memory": "memory",
    "flight": "in flight",
    "issue": "issue",
    "cache": "L2 cache",
    "compute": "arithmetic",
    "turns": "idle programs",
    "gap": "launch gap",
    "serial": "latency",
}
"""Names of the limits: bandwidth of memory, bytes in flight, issue slots, bandwidth of L2, peak arithmetic, programs
without work, the gap between kernels, loads and steps that wait for one another."""


def data(
    made: Prediction, other: Prediction, compared: Iterable[Comparison], measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything, in SI units. other: the same without (or with) a CUDA graph; measured: from `measure`."""
    return {
        "kind": LABEL,
        "device": asdict(made.device),
        "workload": _workload(made.workload),
        "step": summary(made),
        ("step_with_graph" if other.workload.graph else "step_without_graph"): summary(other),
        "launches": [
            {
                "name": line.work.name,
                "kernel": line.work.kernel,
                "times": line.work.times,
                "rows": line.work.rows,
                "weight_bytes": line.work.weights,
                "kv_bytes": line.work.kv,
                "other_bytes": line.work.other,
                "bytes_again": line.work.again,
                "flops": line.work.flops,
                "programs": line.work.programs,
                "active_programs": line.work.active,
                "seconds": asdict(line.each),
                "ceiling_seconds": line.ceiling,
                "bound": line.bound,
                "parts": {key: asdict(part) for key, part in line.parts.items()},
            }
            for line in made.lines
        ],
        "codegen": {"target": made.figures.target, "dtype": made.figures.dtype, "triton": made.figures.triton},
        "notes": made.notes,
        "published": [
            asdict(item.result)
            | {"ceiling_steps_per_second": item.ceiling, "share_of_ceiling": item.share}
            | {"predicted": summary(item.predicted)}
            for item in compared
        ],
        "assumptions": [asdict(item) for item in ASSUMPTIONS],
        "statements": list(STATEMENTS),
    } | ({} if measured is None else {"measured": measured})


def measured_data(workload: Workload, measured: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """A measurement that no prediction stands beside. notes: why, a sentence each."""
    return {"kind": "measurement", "workload": _workload(workload), "measured": measured, "notes": list(notes)}


def measured_text(workload: Workload, measured: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The same for people."""
    rows = [[name, KERNELS[name], f"{measured['launches'][name] * 1e6:.1f}"] for name in LAUNCHES]
    seconds = measured["step_seconds"]
    rate = f"{1 / seconds:.0f} steps per second, {1 / seconds / STEPS_PER_SECOND:.1f} x realtime"
    return (
        f"MEASURED, WITHOUT A PREDICTION: {measured['device']}\n{_asked(workload)}\n\n"
        + table(["launch", "kernel", "us each"], rows, left=2)
        + f"\n\na step\n  {seconds * 1e3:.3f} ms, {rate}\n\nto note\n"
        + "\n".join(f"  {note}" for note in notes)
    )


def _workload(workload: Workload) -> dict[str, Any]:
    return {
        "dtype": workload.dtype, "requests": workload.requests, "rows": workload.step.rows,
        "context": workload.context, "text": workload.text, "guidance": workload.guided, "graph": workload.graph,
        "weights": workload.weights, "config": asdict(workload.config),
    }  # fmt: skip


def summary(made: Prediction) -> dict[str, Any]:
    """Of a whole step: low and high are best and worst case, rates the other way round."""
    requests = made.workload.requests
    rate = [1 / made.step.high, 1 / made.step.low]
    return {
        "seconds": asdict(made.step),
        "gpu_seconds": asdict(made.gpu),
        "host_seconds": asdict(made.host),
        "steps_per_second": rate,
        "realtime": [value / STEPS_PER_SECOND for value in rate],
        "realtime_of_all_requests": [requests * value / STEPS_PER_SECOND for value in rate],
        "bytes": made.moved(),
        "streamed_bytes": made.streamed(),
        "ceiling_seconds": made.ceiling,
        "ceiling_steps_per_second": 1 / made.ceiling,
        "share_of_ceiling": [made.ceiling / made.step.high, made.ceiling / made.step.low],
        "launches": made.launches,
    }


def text(
    made: Prediction, other: Prediction, compared: Sequence[Comparison], measured: Mapping[str, Any] | None
) -> str:
    """The report for people."""
    parts = [_head(made), _launches(made, measured), _step(made, other, measured), _published(compared)]
    if made.notes:
        parts.append("to note\n" + "\n".join(f"  {note}" for note in made.notes))
    return "\n\n".join([*parts, _assumptions(made)])


def table(head: Sequence[str] | None, rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they must be; the first `left` are flush left, the others flush right."""
    lines = [*([list(head)] if head else []), *map(list, rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join(
        "  " + "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )  # fmt: skip


def span(found: Range, factor: float = 1.0, digits: int = 2) -> str:
    return f"{found.low * factor:.{digits}f} - {found.high * factor:.{digits}f}"


def _asked(workload: Workload) -> str:
    rows = workload.step.rows
    weights = "" if workload.weights == FLOAT else f", weights {workload.weights}"
    return (
        f"{workload.dtype}{weights}, {workload.requests} request{'s' if workload.requests > 1 else ''} "
        f"({rows} row{'s' if rows > 1 else ''}, {'guidance' if workload.guided else 'no guidance'}), "
        f"{workload.context} tokens of context, {workload.text} bytes of text; "
        f"{'CUDA graph' if workload.graph else 'launch by launch'}"
    )


def _head(made: Prediction) -> str:
    device = made.device
    chained = ", programmatic dependent launch" if device.chained else ""
    return (
        f"{LABEL.upper()}: {device.name}\n"
        f"{_asked(made.workload)}{chained}\n"
        f"published: {device.bandwidth / 1e12:g} TB/s, {device.matrix / 1e12:g} TFLOP/s in 16 bit, "
        f"{device.vector / 1e12:g} in fp32, {device.units} units at {device.clock / 1e9:g} GHz ({device.source})\n"
        f"times are from a best to a worst case; kernels as compiled by Triton {made.figures.triton} for "
        f"{made.figures.target} in {made.figures.dtype}"
    )


def _launches(made: Prediction, measured: Mapping[str, Any] | None) -> str:
    head = ["launch", "kernel", "bound by", "times", "MB each", "ceiling us", "us each", "us per step"]
    rows = []
    for line in made.lines:
        item = line.work
        cells = [
            item.name, item.kernel, PARTS[line.bound], str(item.times), f"{item.moved / 1e6:.2f}",
            f"{line.ceiling * 1e6:.2f}", span(line.each, 1e6, 1), span(line.each.times(item.times), 1e6, 0),
        ]  # fmt: skip
        if measured is not None:
            cells.append(f"{measured['launches'][item.name] * 1e6:.1f}")
        rows.append(cells)
    return table(head + (["measured us each"] if measured is not None else []), rows, left=3)


def _step(made: Prediction, other: Prediction, measured: Mapping[str, Any] | None) -> str:
    facts = summary(made)

    def rate(name: str, factor: float = 1.0, digits: int = 0) -> str:
        low, high = facts[name]
        return f"{low * factor:.{digits}f} - {high * factor:.{digits}f}"

    rows = [
        ["launches", str(made.launches)],
        ["moves", f"{made.moved() / 1e6:,.1f} MB, {made.streamed() / 1e6:,.1f} MB of it weights, keys and values"],
        ["time", f"{span(made.step, 1e3, 3)} ms (GPU {span(made.gpu, 1e3, 3)}, host {span(made.host, 1e3, 2)})"],
        ["steps per second", rate("steps_per_second")],
        ["realtime", f"{rate('realtime', 1, 1)} x" + _of_all(made, facts)],
        ["bandwidth ceiling", f"{made.ceiling * 1e3:.3f} ms, {1 / made.ceiling:.0f} steps per second"],
        ["share of it", f"{rate('share_of_ceiling', 100)} %"],
        ["with a graph" if other.workload.graph else "without a graph", f"{span(other.step, 1e3, 2)} ms"],
    ]
    if measured is not None:
        seconds = measured["step_seconds"]
        share = f"{100 * made.ceiling / seconds:.0f} % of the ceiling ({measured['device']})"
        rows.append(["measured", f"{seconds * 1e3:.3f} ms, {1 / seconds:.0f} steps per second, {share}"])
    return "a step\n" + table(None, rows, left=2)


def _of_all(made: Prediction, facts: Mapping[str, Any]) -> str:
    if made.workload.requests == 1:
        return ""
    low, high = facts["realtime_of_all_requests"]
    return f" each, {low:.0f} - {high:.0f} x in all"


def _published(compared: Sequence[Comparison]) -> str:
    head = ["GPU", "what", "dtype", "steps/s", "x realtime", "ceiling", "share", "predicted here"]
    rows = [
        [
            item.predicted.device.name, item.result.how, item.result.dtype, f"{item.result.steps_per_second:.0f}",
            f"{item.result.steps_per_second / STEPS_PER_SECOND:.2f}", f"{item.ceiling:.0f}", f"{item.share:.0%}",
            f"{1 / item.predicted.step.high:.0f} - {1 / item.predicted.step.low:.0f}",
        ]
        for item in compared
    ]  # fmt: skip
    first = compared[0].predicted.workload
    stands = sorted({item.predicted.figures.stand_in for item in compared} - {""})
    return (
        "published for Dia-1.6B, one request; ceiling: its weights alone at full bandwidth; predicted: these kernels, "
        f"{first.context} tokens of context, {first.text} bytes of text\n"
        + table(head, rows, left=3)
        + "".join(f"\n  {why}" for why in stands)
    )


def _assumptions(made: Prediction) -> str:
    device = made.device
    rows = []
    for item in ASSUMPTIONS:
        best, worst, source = item.span(device.target)
        rows.append([f"{_value(item, best)} - {_value(item, worst)}{_unit(item)}", item.meaning, source])
    own = f"latency of the memory {device.latency * 1e9:.0f} ns, L2 {device.cache_bandwidth / 1e12:g} TB/s"
    lines = [f"{own}: assumed unless the device's source names them", *STATEMENTS]
    return "assumptions, best - worst\n" + table(None, rows, left=3) + "\n" + "\n".join(
        f"  {line}" for line in lines
    )  # fmt: skip


def _value(item: Assumption, value: float) -> str:
    return f"{value * 1e6:g} us" if item.unit == "s" else f"{value:g}"


def _unit(item: Assumption) -> str:
    return "" if item.unit == "s" else f" {item.unit}"
