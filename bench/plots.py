"""Pictures of what benchmarks found, each for light and for dark pages, as PNG and as SVG.

    python -m bench.plots [--suite suite.json] [--traffic traffic.json] [--throughput throughput.csv] [--out FOLDER]

`bench.suite` and `bench.throughput` draw theirs by themselves; `bench.traffic --json` writes what the third needs.
docs/benchmarks.md says how to read them.
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.style import save_figure
from bench.tools.results import flat, read
from dia_fast.errors import DiaFastError, InputError

BACKENDS = {"torch": "C5", "compile": "C1", "triton": "C0", "own": "C2"}
MARKS = {"torch": "s", "compile": "^", "triton": "o", "own": "D"}
Benchmark = Mapping[str, Any]


def draw_suite(run: Mapping[str, Any], folder: Path) -> list[Path]:
    """Everything that a run of the suite can show; what was found wrong has no time and is in none. Raises InputError.

    run: the JSON of `bench.suite`.
    """
    machine, found = run["machine_info"], run["benchmarks"]
    note = f"{machine['device']}, {machine['dtype']}, {machine['size']}, torch {machine['torch']}"
    kernels = [item for item in found if item["extra_info"]["kind"] == "kernel"]
    steps = [item for item in found if item["extra_info"]["kind"] == "step"]
    paths = []
    if kernels:
        paths += roofline(kernels, machine["measured"], folder, note)
        paths += times(kernels, folder, note)
    if steps:
        layers = f", {steps[0]['extra_info']['decoder_layers']} decoder layers"
        paths += latency(steps, machine["measured"], folder, note + layers)
        paths += throughput(steps, folder, note + layers)
    return paths


def roofline(kernels: Sequence[Benchmark], peaks: Mapping[str, float], folder: Path, note: str) -> list[Path]:
    """Operations per second over operations per byte, under what the device itself reaches in either."""

    def draw(axes: Any) -> None:
        lowest = min(_intensity(item) for item in kernels)
        ridge = peaks["compute"] / peaks["bandwidth"]
        ends = [min(lowest, ridge) / 2, 4 * max(ridge, *(_intensity(item) for item in kernels))]
        roof = sorted([*ends, ridge])
        axes.plot(
            roof, [min(peaks["compute"], x * peaks["bandwidth"]) / 1e9 for x in roof], "-", color="C3",
            label=f"measured: {peaks['bandwidth'] / 1e9:.3g} GB/s, {peaks['compute'] / 1e12:.3g} TFLOP/s",
        )  # fmt: skip
        for backend in BACKENDS:
            points = [item for item in kernels if item["extra_info"]["backend"] == backend]
            if points:
                heights = [item["extra_info"]["operations"] / item["stats"]["median"] / 1e9 for item in points]
                axes.plot(
                    [_intensity(item) for item in points], heights, MARKS[backend], color=BACKENDS[backend],
                    markersize=5, alpha=0.8, label=backend,
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="operations per byte that has to move", ylabel="GFLOP/s")
        axes.legend()

    return save_figure(draw, folder, "roofline", title="Kernels under the roofline", note=note)


def times(kernels: Sequence[Benchmark], folder: Path, note: str) -> list[Path]:
    """Median of every kernel and shape, quartiles as whiskers, backends side by side."""
    groups = list(dict.fromkeys(item["group"] for item in kernels))
    used = [name for name in BACKENDS if any(item["extra_info"]["backend"] == name for item in kernels)]

    def draw(axes: Any) -> None:
        height = 0.6 / len(used)
        for index, backend in enumerate(used):
            mine = [item for item in kernels if item["extra_info"]["backend"] == backend]
            places = [groups.index(item["group"]) + (index - (len(used) - 1) / 2) * height for item in mine]
            middle = [item["stats"]["median"] * 1e6 for item in mine]
            spread = [
                [(item["stats"]["median"] - item["stats"]["q1"]) * 1e6 for item in mine],
                [(item["stats"]["q3"] - item["stats"]["median"]) * 1e6 for item in mine],
            ]
            axes.errorbar(
                middle, places, xerr=spread, fmt=MARKS[backend], color=BACKENDS[backend], markersize=4, label=backend
            )
        axes.set(xscale="log", xlabel="µs a call, median and quartiles")
        axes.set_yticks(range(len(groups)), [name.replace("-", " ") for name in groups], fontsize=7)
        axes.invert_yaxis()
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    size = 9.0, 1.5 + 0.22 * len(groups)
    return save_figure(draw, folder, "kernels", title="Time of every kernel", note=note, size=size)


def latency(steps: Sequence[Benchmark], peaks: Mapping[str, float], folder: Path, note: str) -> list[Path]:
    """Draw a decode step of one request over its context, and the least it could take."""
    single = [item for item in steps if item["extra_info"]["requests"] == 1]

    def draw(axes: Any) -> None:
        for backend in _backends(single):
            mine = sorted(_of(single, backend), key=lambda item: item["extra_info"]["size"])
            sizes = [item["extra_info"]["size"] for item in mine]
            middle = [item["stats"]["median"] * 1e3 for item in mine]
            axes.plot(sizes, middle, MARKS[backend] + "-", color=BACKENDS[backend], label=backend)
            axes.fill_between(
                sizes, *([item["stats"][edge] * 1e3 for item in mine] for edge in ("q1", "q3")),
                color=BACKENDS[backend], alpha=0.2, linewidth=0,
            )  # fmt: skip
        moved = sorted({item["extra_info"]["size"]: item["extra_info"]["bytes"] for item in single}.items())
        floor = [size / peaks["bandwidth"] * 1e3 for _, size in moved]
        axes.plot([size for size, _ in moved], floor, ":", color="C3", label="its bytes at the measured bandwidth")
        axes.set(xlabel="context, tokens", ylabel="ms a step")
        axes.set_ylim(bottom=0)
        axes.legend()

    return save_figure(draw, folder, "latency", title="A step of one request with guidance", note=note)


def throughput(steps: Sequence[Benchmark], folder: Path, note: str) -> list[Path]:
    """Frames per second over the number of requests, beside the line of perfect scaling."""
    shortest = min(item["extra_info"]["size"] for item in steps)
    same = [item for item in steps if item["extra_info"]["size"] == shortest]

    def draw(axes: Any) -> None:
        counts: list[int] = []
        for backend in _backends(same):
            mine = sorted(_of(same, backend), key=lambda item: item["extra_info"]["requests"])
            counts = [item["extra_info"]["requests"] for item in mine]
            rates = [count / item["stats"]["median"] for count, item in zip(counts, mine, strict=True)]
            axes.plot(counts, rates, MARKS[backend] + "-", color=BACKENDS[backend], label=backend)
            ideal = [rates[0] * count / counts[0] for count in counts]
            axes.plot(counts, ideal, ":", color=BACKENDS[backend], alpha=0.6)
        axes.plot([], [], ":", color="C3", label="perfect scaling")
        axes.set(xscale="log", yscale="log", xlabel="requests in the batch", ylabel="frames per second, all together")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.legend()

    title = f"Frames per second over the batch, context {shortest}"
    return save_figure(draw, folder, "throughput", title=title, note=note)


def traffic(found: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw the bytes of each launch, by kind, over the fewest possible. found: results of `bench.traffic`."""
    names = [f"{item['kernel']}, {item['rows']} rows, context {item['context']}" for item in found]

    def draw(axes: Any) -> None:
        left = [0.0] * len(found)
        for index, (kind, label) in enumerate((("weights", "weights"), ("kv", "keys, values"), ("other", "other"))):
            shares = [item[kind] / item["minimum"] for item in found]
            axes.barh(range(len(found)), shares, left=left, color=f"C{index}", label=label)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axes.axvline(1, color="C3", linestyle=":", label="the fewest possible")
        axes.set(xlabel="bytes moved / fewest possible")
        axes.set_yticks(range(len(found)), names, fontsize=7)
        axes.invert_yaxis()
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    note = "counted in the interpreter at the shapes of Dia-1.6B, the same on every machine"
    size = 9.0, 1.5 + 0.22 * len(found)
    return save_figure(draw, folder, "traffic", title="Bytes moved beside the fewest possible", note=note, size=size)


def batches(rows: Sequence[Mapping[str, Any]], folder: Path, note: str) -> list[Path]:
    """Frames per second of the whole engine over the number of requests. rows: of the CSV of `bench.throughput`."""
    counts = [int(row["requests"]) for row in rows]

    def draw(axes: Any) -> None:
        rates = [float(row["frames_per_second"]) for row in rows]
        axes.plot(counts, rates, "o-", color="C0", label="dia-fast")
        theirs = [row for row in rows if row.get("transformers_step_ms")]
        if theirs:
            other = [int(row["requests"]) / float(row["transformers_step_ms"]) * 1e3 for row in theirs]
            axes.plot([int(row["requests"]) for row in theirs], other, "s-", color="C1", label="transformers, static")
        axes.plot(counts, [rates[0] * count / counts[0] for count in counts], ":", color="C3", label="perfect scaling")
        axes.set(xscale="log", yscale="log", xlabel="requests in the batch", ylabel="frames per second, all together")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.legend()

    return save_figure(draw, folder, "throughput", title="The engine over the batch", note=note)


def _intensity(item: Benchmark) -> float:
    return float(item["extra_info"]["operations"] / item["extra_info"]["bytes"])


def _of(items: Sequence[Benchmark], backend: str) -> list[Benchmark]:
    return [item for item in items if item["extra_info"]["backend"] == backend]


def _backends(items: Sequence[Benchmark]) -> list[str]:
    return [backend for backend in BACKENDS if _of(items, backend)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", type=Path, help="suite.json of bench.suite")
    parser.add_argument("--traffic", type=Path, help="what bench.traffic --json wrote")
    parser.add_argument("--throughput", type=Path, help="throughput.csv of bench.throughput")
    parser.add_argument("--note", default="", help="small print below the last")
    parser.add_argument("--out", type=Path, default=Path("bench/results/plots"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    paths: list[Path] = []
    try:
        if options.suite:
            paths += draw_suite(json.loads(_read(options.suite)), options.out)
        if options.traffic:
            paths += traffic(flat(read(options.traffic)), options.out)
        if options.throughput:
            rows = list(csv.DictReader(_read(options.throughput).splitlines()))
            paths += batches(rows, options.out, options.note)
    except DiaFastError as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, ValueError) as error:
        print(f"plots: not what the benchmark writes: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if not paths:
        parser.error("name at least one of --suite, --traffic and --throughput")
    print("\n".join(map(str, paths)))
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
