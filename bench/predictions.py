"""Predict a step of one, 8 and 32 requests on GPUs that are not here: by the default configs, and by other tables.

    python -m bench.predictions [--gpus h100 h200] [--tables bench/candidates/small_footprints.json] [--json FILE]

Kernels are compiled here, so that a table that nobody has measured can be compared with the default configs. Where a
step was measured (`bench/published`), the time and the error of the middle of its prediction stand beside it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import codegen, figures
from bench.ordering import configured
from bench.published import FOLDER, H200
from bench.tools.results import Results, add_options, flat, read
from dia_fast.diagnostics.roofline import devices
from dia_fast.diagnostics.roofline.figures import Figure, Figures
from dia_fast.diagnostics.roofline.predict import Prediction, Workload, predict
from dia_fast.errors import DiaFastError, InputError
from dia_fast.model.config import DiaConfig
from dia_kernels.launcher import read_table

REQUESTS = (1, 8, 32)
CONTEXT, TEXT = 860, 200
DEFAULT = "default"


def compiled(target: str, table: Path | None) -> Figures:
    """Return the figures of the kernels in bf16, by a table of configs in front of the default ones."""
    with configured(table):
        lines = [
            asdict(line)
            for line in codegen.report([target], [2 * count for count in REQUESTS], ["bfloat16"])
            if line.rows
        ]
    found = figures.compact(lines)[target]["bfloat16"]
    table_of = {name: {int(rows): _figure(values) for rows, values in of.items()} for name, of in found.items()}
    return Figures(target, "bfloat16", codegen.triton.__version__, table_of)


def _figure(values: Sequence[float]) -> Figure:
    block, warps, resident, in_flight, instructions = values
    return Figure(int(block), int(warps), int(resident), int(in_flight), instructions)


def measured() -> dict[tuple[str, int], float]:
    """Return milliseconds of the steps that were measured last, by GPU and requests."""
    newest = flat(read(FOLDER / H200 / "steps.json"))[-1]
    rows = flat(read(FOLDER / H200 / "rows.json"))
    return {("h200", 1): newest["step_ms"]} | {("h200", one["requests"]): one["step_ms"] for one in rows}


def values(made: Prediction, known: float | None) -> Mapping[str, float | None]:
    """Return the figures of a prediction. known: milliseconds that were measured."""
    low, high = made.step.low * 1e3, made.step.high * 1e3
    middle = (low + high) / 2
    return {
        "low_ms": low,
        "high_ms": high,
        "middle_ms": middle,
        "share_percent": 100 * made.ceiling * 1e3 / middle,
        "measured_ms": known,
        "error_percent": None if known is None else 100 * (middle / known - 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="predictions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", nargs="+", default=["h100", "h200"], metavar="GPU")
    parser.add_argument("--tables", nargs="*", type=Path, default=[], metavar="FILE", help="beside the default configs")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        gpus = [devices.find(name) for name in options.gpus]
        for path in options.tables:
            _check(path)
        results = Results(parser, options, arguments)
    except DiaFastError as error:
        print(f"predictions: {error}", file=sys.stderr)
        return 2
    known, made = measured(), {}
    for path in (None, *options.tables):
        name = DEFAULT if path is None else path.stem
        for device in gpus:
            if (device.target, path) not in made:
                made[device.target, path] = compiled(device.target, path)
            for requests in REQUESTS:
                workload = Workload(DiaConfig(), "bfloat16", requests, CONTEXT, TEXT)
                step = predict(device, workload, made[device.target, path])
                # What was measured ran by configs like the default ones.
                found = values(step, known.get((device.key, requests)) if path is None else None)
                results.add({"gpu": device.key, "configs": name, "requests": requests}, found)
                print(f"{device.name}, {name}, {requests} requests: {found['low_ms']:.2f} to {found['high_ms']:.2f} ms")
    return results.end(0)


def _check(path: Path) -> None:
    try:
        read_table(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"--tables: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
