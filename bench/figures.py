"""The compact figures that `dia-fast plan` predicts with, from reports of `bench.codegen`.

    python -m bench.codegen --json report.json
    python -m bench.figures report.json [more.json ...] [--out FILE] [--update]

Reports are put together; where two have the same target, dtype and rows the whole step of the later one counts. All
must be of one version of Triton. With --update, figures that the reports do not have stay what they are in the file: a
report of one row count brings all launches up to date whose code does not depend on it.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine_code import MACHINES
from bench.tools import results
from dia_fast.diagnostics.roofline import figures, work
from dia_fast.diagnostics.roofline.predict import SIZES
from dia_fast.errors import InputError
from dia_fast.model.config import DiaConfig
from dia_fast.model.quantization import FLOAT
from dia_fast.utils.files import replacing
from dia_kernels.triton import gemv

OUT = Path(work.__file__).parent / figures.FILE
Line = dict[str, Any]
Table = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
KINDS = [dtype + weights for dtype in figures.DTYPES for weights in ("", figures.IN_8_BITS)]


def read(paths: Iterable[Path]) -> tuple[str, list[Line]]:
    """Triton's version and all lines. Raises InputError or ValueError for other files or several versions."""
    versions: dict[str, Path] = {}
    steps: dict[tuple[str, str, int], list[Line]] = {}
    for path in paths:
        report = results.read(path)
        if report["bench"] != "codegen":
            raise InputError(f"{path} is no report of bench.codegen, but of {report['bench']}")
        versions.setdefault(report["versions"]["triton"], path)
        lines = [line for line in results.flat(report) if "kernel" in line]
        kind = figures.IN_8_BITS if any(line["weights"] != FLOAT for line in lines) else ""
        steps |= _by_step(line | {"kind": line["dtype"] + kind} for line in lines)
    if len(versions) != 1:
        raise ValueError(
            "reports of different versions of Triton: " + ", ".join(f"{k} ({v})" for k, v in versions.items())
        )
    return next(iter(versions)), [line for lines in steps.values() for line in lines]


def _by_step(lines: Iterable[Line]) -> dict[tuple[str, str, int], list[Line]]:
    """By target, kind and rows, of which each report has all launches or none."""
    steps: dict[tuple[str, str, int], list[Line]] = defaultdict(list)
    for line in lines:
        steps[line["target"], _kind(line), line["rows"]].append(line)
    return steps


def _kind(line: Line) -> str:
    """The kind of a line: its dtype, if nobody has said that the weights of its step are in 8 bits."""
    return str(line.get("kind", line["dtype"]))


def compact(lines: Iterable[Line]) -> Table:
    """Return target -> kind -> launch -> rows that it computes -> the fields of `Figure`.

    A kind is a dtype, or a dtype beside weights in 8 bits, of which projections alone are kept.
    """
    steps = _by_step(line for line in lines if line["rows"])
    table: Table = {}
    for target in MACHINES:
        for kind in KINDS:
            kept = work.PROJECTIONS if kind.endswith(figures.IN_8_BITS) else work.LAUNCHES
            found: dict[str, dict[str, list[float]]] = {name: {} for name in kept}
            for rows in sorted(count for a, b, count in steps if (a, b) == (target, kind)):
                for name, line in name_launches(steps[target, kind, rows]).items():
                    if kept is work.PROJECTIONS and name not in kept:
                        continue
                    found.setdefault(name, {})
                    x_rows = rows // 2 if rows > 1 and name.startswith("cross") else rows
                    key = str(figures.bucket(target, x_rows)) if name in work.PROJECTIONS else "0"
                    figure = _figure(name, line, x_rows)
                    # Of row counts that share their code, the one that works hardest.
                    if key not in found[name] or found[name][key][-1] < figure[-1]:
                        found[name][key] = figure
            if any(found.values()):
                table.setdefault(target, {})[kind] = found
    return table


def name_launches(lines: Sequence[Line]) -> dict[str, Line]:
    """Return the launches of one step by name. A report leaves out a launch that equals an earlier one."""
    by_kernel: dict[str, list[Line]] = defaultdict(list)
    named: dict[str, Line] = {}
    for line in lines:
        if line["kernel"].endswith(work.FIRST):
            named[line["kernel"]] = line  # kernels whose one launch has their name
        else:
            by_kernel[line["kernel"]].append(line)
    for kernel, found in by_kernel.items():
        names = [name for name in work.LAUNCHES if work.KERNELS[name] == kernel]
        if len(found) > len(names):
            raise ValueError(
                f"{kernel} is launched {len(found)} times in a step, which has {len(names)} launches of it"
            )
        if names == ["o", "cross_o", "down"] and len(found) == 2:
            found = [found[0], found[0], found[1]]  # down is four times as wide as the others: never like them
        elif len(found) < len(names):
            found = found + [found[-1]] * (len(names) - len(found))
        named |= dict(zip(names, found, strict=True))
    if not set(named) >= set(work.LAUNCHES):
        raise ValueError(f"a step of {lines[0]['target']}, {_kind(lines[0])} has the launches {sorted(by_kernel)} only")
    return named


def _figure(name: str, line: Line, rows: int) -> list[float]:
    """Return the fields of `Figure`; some of them follow from the shapes of the 1.6B model."""
    machine, size = MACHINES[line["target"]], SIZES[line["dtype"]]
    weight_size = 1 if line["weights"] != FLOAT else size
    resident = max(1, round(line["occupancy"] * machine.warps / line["warps"]))
    if name not in work.PROJECTIONS:
        splits = {"self_attention": work.SELF_SPLIT, "cross_attention": work.CROSS_SPLIT}
        wanted = splits.get(name.removesuffix(work.FIRST))
        tokens = work.split(128, size, line["target"], wanted) if wanted else 0
        return [tokens, line["warps"], resident, 0, line["instructions"]]
    features, width = shapes()[name]
    dtype = getattr(torch, line["dtype"])
    config = gemv.default_config(
        work.KERNELS[name], dtype, line["target"], rows=rows, features=features, hidden=width,
        weight_bits=8 * weight_size,
    )  # fmt: skip
    sharing = -(-rows // config["BLOCK_R"])  # programs of the same weights, each with some of the rows
    tiles = line["programs"] // sharing
    block = min((1 << power for power in range(3, 9)), key=lambda n: abs(-(-features // n) - tiles))
    if -(-features // block) != tiles:
        raise ValueError(f"{name}: {line['programs']} programs for {features} features is no power of two each")
    busy = min(resident, line["programs"] / machine.units)
    loads = block * width * weight_size / (16 * machine.lanes)  # by a whole warp, of a program
    if line["issue"]:
        per_load = sharing * line["issue"] * machine.slots_per_load
    else:  # weights cannot be told from activations, but the code has no loops
        per_load = sharing * line["instructions"] * line["warps"] / loads
    return [block, line["warps"], resident, round(line["in_flight"] / busy), round(per_load, 1)]


def shapes() -> dict[str, tuple[int, int]]:
    """Features and width of every projection of the 1.6B model."""
    step = work.Step(1, 1, 1, 2, True, 1, 1, 1, True)
    tiles = work.Tiles(lambda name, rows: 16, work.SELF_SPLIT, work.CROSS_SPLIT, False)
    return {item.name: (item.features, item.width) for item in work.launches(DiaConfig(), step, tiles)}


def updated(path: Path, triton: str, new: Table) -> Table:
    """The table of a file with new figures in the place of its own. Raises ValueError for another version of Triton."""
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["triton"] != triton:
        raise ValueError(f"{path} is of Triton {old['triton']}, the reports are of {triton}: give a report of all rows")
    table: Table = old["figures"]
    for target, kinds in new.items():
        for kind, names in kinds.items():
            for name, figures_by_rows in names.items():
                table.setdefault(target, {}).setdefault(kind, {}).setdefault(name, {}).update(figures_by_rows)
    return table


def dump(triton: str, table: Table) -> str:
    """JSON with a line per launch: a change shows as one."""
    targets = []
    for target, dtypes in table.items():
        kinds = []
        for dtype, names in dtypes.items():
            lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(rows)}" for name, rows in names.items())
            kinds.append(f'  "{dtype}": {{\n{lines}\n  }}')
        targets.append(f' "{target}": {{\n' + ",\n".join(kinds) + "\n }")
    return f'{{"triton": "{triton}", "figures": {{\n' + ",\n".join(targets) + "\n}}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path, help="JSON files that bench.codegen has written")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--update", action="store_true", help="keep what the file has and the reports have not")
    options = parser.parse_args(arguments)
    try:
        triton, lines = read(options.reports)
        table = compact(lines)
        if options.update:
            table = updated(options.out, triton, table)
    except (OSError, ValueError, KeyError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    with replacing(options.out) as temporary:
        temporary.write_text(dump(triton, table), encoding="utf-8")
    missing = [f"{target} {kind}" for target in MACHINES for kind in KINDS if kind not in table.get(target, {})]
    print(f"{options.out}: Triton {triton}, {sum(map(len, table.values()))} pairs of target and kind")
    if missing:
        print("not among them: " + ", ".join(missing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
