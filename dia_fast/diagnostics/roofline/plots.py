"""The pictures of a prediction; each says on its face that it is one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dia_fast.diagnostics.plotting import save_figure
from dia_fast.diagnostics.roofline.predict import SIZES, STEPS_PER_SECOND, Prediction, predict
from dia_fast.diagnostics.roofline.report import LABEL
from dia_fast.engine.decode_graphs import BUCKETS
from dia_fast.model.quantization import FLOAT

CONTEXTS = (1, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072)


def save(made: Prediction, folder: Path, measured: Mapping[str, Any] | None = None) -> list[Path]:
    """Write roofline, kernels, latency and throughput in their variants and return the paths.

    Raises InputError if matplotlib is missing or the folder cannot be written.
    """
    workload = made.workload
    kind = workload.dtype + ("" if workload.weights == FLOAT else f", weights {workload.weights}")
    note = f"{LABEL}: {made.device.name}, {kind}; bands reach from a best to a worst case"
    paths = []
    for name, title, draw in (
        ("roofline", "What each launch can reach", lambda axes: _roofline(axes, made)),
        ("kernels", "Time of a step by launch", lambda axes: _kernels(axes, made, measured)),
        ("latency", "Time of a step against context", lambda axes: _latency(axes, made, measured)),
        ("throughput", "Throughput against requests at once", lambda axes: _throughput(axes, made)),
    ):
        paths += save_figure(draw, folder, name, title=title, note=note)
    return paths


def _roofline(axes: Any, made: Prediction) -> None:
    """Operations per second over operations per byte, on two logarithmic axes; the roof is the published one."""
    device, size = made.device, SIZES[made.workload.dtype]
    points = [line for line in made.lines if line.work.flops and line.work.streamed]
    intensities = [line.work.flops / line.work.streamed for line in points]
    peak = device.peak(size)
    ridge = peak / device.bandwidth
    xs = [min(intensities) / 2, ridge, max(4 * ridge, 2 * max(intensities))]
    axes.plot(xs, [min(peak, device.bandwidth * x) for x in xs], color="C5")
    axes.annotate("published peaks", (ridge, peak), xytext=(4, 5), textcoords="offset points", fontsize=8)
    beside = 0.0
    for line, x in sorted(zip(points, intensities, strict=True), key=lambda pair: pair[1]):
        # Launches of nearly one intensity would hide one another: they stand side by side, to the right.
        beside = max(x, beside * 1.13)
        best, worst = line.work.flops / line.each.low, line.work.flops / line.each.high
        axes.plot([beside, beside], [worst, best], marker="_", linewidth=2.5, color="C0")
        axes.annotate(
            line.work.name, (beside, worst), xytext=(0, -5), textcoords="offset points", rotation=90, ha="center",
            va="top", fontsize=7,
        )  # fmt: skip
    lowest = min(line.work.flops / line.each.high for line in points)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte from memory", ylabel="operations per second")
    axes.set_ylim(bottom=lowest / 30)


def _kernels(axes: Any, made: Prediction, measured: Mapping[str, Any] | None) -> None:
    lines = list(reversed(made.lines))
    whole = [line.each.times(line.work.times * 1e6) for line in lines]
    axes.barh(range(len(lines)), [span.low for span in whole], color="C0", label="best case")
    axes.barh(
        range(len(lines)), [span.high - span.low for span in whole], left=[span.low for span in whole], color="C1",
        label="worst case",
    )  # fmt: skip
    ceilings = [line.ceiling * line.work.times * 1e6 for line in lines]
    axes.plot(
        ceilings, range(len(lines)), linestyle="", marker="|", markersize=17, markeredgewidth=2,
        color=axes.xaxis.label.get_color(), label="bandwidth ceiling",
    )  # fmt: skip
    if measured is not None:
        found = [measured["launches"][line.work.name] * line.work.times * 1e6 for line in lines]
        axes.plot(found, range(len(lines)), linestyle="", marker="D", color="C3", label="measured")
    axes.set_yticks(range(len(lines)), [f"{line.work.name} x{line.work.times}" for line in lines])
    axes.set(xlabel="us per step")
    axes.legend(fontsize=8)


def _latency(axes: Any, made: Prediction, measured: Mapping[str, Any] | None) -> None:
    most = made.workload.config.decoder.max_position_embeddings
    contexts = sorted({min(context, most) for context in CONTEXTS})
    spans = [predict(made.device, replace(made.workload, context=context)) for context in contexts]
    _band(axes, contexts, [item.step.low * 1e3 for item in spans], [item.step.high * 1e3 for item in spans])
    axes.plot(contexts, [item.ceiling * 1e3 for item in spans], color="C2", label="bandwidth ceiling")
    if measured is not None:
        axes.plot([made.workload.context], [measured["step_seconds"] * 1e3], "D", color="C3", label="measured")
    axes.set(xlabel="tokens of context", ylabel="ms per step", xlim=(0, most))
    axes.set_ylim(bottom=0)
    axes.legend()


def _throughput(axes: Any, made: Prediction) -> None:
    spans = [(count, predict(made.device, replace(made.workload, requests=count))) for count in BUCKETS]
    counts = [count for count, _ in spans]

    def seconds_of_sound(seconds: float, count: int) -> float:
        return count / seconds / STEPS_PER_SECOND

    _band(
        axes, counts, [seconds_of_sound(item.step.high, count) for count, item in spans],
        [seconds_of_sound(item.step.low, count) for count, item in spans],
    )  # fmt: skip
    ceilings = [seconds_of_sound(item.ceiling, count) for count, item in spans]
    axes.plot(counts, ceilings, color="C2", label="bandwidth ceiling")
    axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="seconds of sound per second, all together")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend()


def _band(axes: Any, xs: list[int], low: list[float], high: list[float]) -> None:
    axes.fill_between(xs, low, high, color="C0", alpha=0.3, label="predicted")
    axes.plot(xs, low, color="C0", linewidth=1)
    axes.plot(xs, high, color="C0", linewidth=1)
