"""Compare two files that a benchmark wrote with `--json`.

    python -m bench.compare A B [--changed 1]

Prints how the two runs differ in commit, versions, device, kernel table and command, then every figure of both with
the ratio B / A. Results are matched by their case; those of one run alone are listed behind the table. The exit status
is 2 if a file cannot be read or the two are of different benchmarks.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tools.results import read
from dia_fast.errors import DiaFastError, InputError

HEAD = ("commit", "dirty", "device", "processor", "table", "argv", "versions", "facts")
Key = tuple[tuple[str, Any], ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument(
        "--changed", type=float, default=0.0, metavar="PERCENT", help="leave out figures that differ by less"
    )
    options = parser.parse_args(arguments)
    try:
        a, b = read(options.a), read(options.b)
        if a["bench"] != b["bench"]:
            raise InputError(f"{options.a} is of {a['bench']} and {options.b} of {b['bench']}: nothing to compare")
    except DiaFastError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n".join([f"{a['bench']}, A beside B", *differences(a, b), "", *table(a, b, options.changed)]))
    return 0


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for everything in which the circumstances of two runs differ."""
    for name in HEAD:
        old, new = a[name], b[name]
        if name in ("versions", "facts"):
            for part in sorted(old.keys() | new.keys()):
                if old.get(part) != new.get(part):
                    yield f"{part}: {old.get(part)} | {new.get(part)}"
        elif old != new:
            yield f"{name}: {_told(old)} | {_told(new)}"
    for name, run in (("A", a), ("B", b)):
        if run["status"] is None:
            yield f"{name} was broken off: some of its results are missing"


def table(a: Mapping[str, Any], b: Mapping[str, Any], changed: float) -> Iterator[str]:
    """Yield the lines of a Markdown table, and those of results that only one run has."""
    old, new = _by_case(a), _by_case(b)
    yield "| case | figure | A | B | B / A |"
    yield "|---|---|---:|---:|---:|"
    for key, values in new.items():
        for name in old[key] | values if key in old else ():
            before, value = old[key].get(name), values.get(name)
            ratio = _ratio(before, value)
            if changed and (before == value if ratio is None else abs(ratio - 1) * 100 < changed):
                continue
            shown = "" if ratio is None else f"{ratio:.3f}"
            yield f"| {_case(key)} | {name} | {_figure(before)} | {_figure(value)} | {shown} |"
    for name, ones, others in (("A", old, new), ("B", new, old)):
        for key in ones:
            if key not in others:
                yield f"only in {name}: {_case(key)}"


def _by_case(run: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """Return the values of each result by its case; of several alike, the later ones are numbered."""
    found: dict[Key, dict[str, Any]] = {}
    for row in run["results"]:
        key: Key = tuple(sorted(row["case"].items()))
        count = 1
        while key in found:
            count += 1
            key = (*sorted(row["case"].items()), ("repeat", count))
        found[key] = row["values"]
    return found


def _ratio(old: Any, new: Any) -> float | None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new))
    return new / old if numbers and old else None


def _case(key: Key) -> str:
    return ", ".join(f"{name} {value}" for name, value in key)


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _told(value: Any) -> str:
    if isinstance(value, dict):  # the kernel table
        return f"{value['name']} ({value['sha256'][:12]})"
    return " ".join(value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
