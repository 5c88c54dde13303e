"""Has anything become worse than what is recorded in bench/baseline.json?

    python -m bench.check [--only launches,traffic,codegen,memory,ratio] [--all] [--json FILE]
    python -m bench.check --update [--only ...]

Measures five groups of figures (`bench/metrics.py`) and prints those that differ from the recorded ones; the ratio is
judged by a bar for each instruction set. The exit status is 1 if one is worse by more than its noise, is missing, or is
not recorded; 2 if something could not be compared. Figures that vary from run to run are measured twice more before
they are called worse. `--update` records what is measured now.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import baseline, metrics
from bench.baseline import Finding, Group
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError, InputError

BASELINE = Path(__file__).with_name("baseline.json")
ANEW = "python -m bench.check --update"
UPDATE_RUNS = 5  # of what varies, from which its noise is taken

Measure = Callable[[str, Path], Group]  # group, folder for a checkpoint; raises DiaFastError


def chosen(text: str) -> list[str]:
    """Return the groups of `--only`, in the order of the gate. Raises argparse.ArgumentTypeError for others."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in metrics.GROUPS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {','.join(metrics.GROUPS)}")
    return [name for name in metrics.GROUPS if name in names]


def main(arguments: Sequence[str] | None = None, measure: Measure = metrics.in_a_process) -> int:
    """Entry point; returns the exit status. measure: what takes the figures of a group."""
    parser = argparse.ArgumentParser(prog="check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=chosen, default=list(metrics.GROUPS), metavar="GROUP,...", help="these groups")
    parser.add_argument("--update", action="store_true", help="record what is measured now, and say what changed")
    parser.add_argument("--all", action="store_true", help="print figures that did not change, too")
    add_options(parser)
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help="default: bench/baseline.json")
    options = parser.parse_args(arguments)
    if options.update and (options.json or options.csv):
        parser.error("--update writes the baseline; --json and --csv are for a comparison")
    try:
        with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
            if options.update:
                return update(options, lambda name: _measured(name, Path(folder), measure))
            results = Results(parser, options, arguments)
            return results.end(check(options, lambda name: _measured(name, Path(folder), measure), results))
    except DiaFastError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace, measured: Callable[[str], Group], results: Results) -> int:
    """Compare, print and return the exit status. Raises DiaFastError if there is no baseline."""
    required = metrics.required()
    recorded = baseline.read(options.baseline) | required
    found: list[Finding] = []
    problems: list[str] = []
    for name in options.only:
        try:
            if name not in recorded:
                raise InputError(f"{name}: not in {options.baseline}; record it with {ANEW} --only {name}")
            found += _compared(name, recorded[name], measured)
        except DiaFastError as error:
            problems.append(str(error))
    failed = [item for item in found if item.fails]
    status = 1 if failed else 2 if problems else 0
    results.extend((_case(item), _values(item)) for item in found)
    results.extend(({"problem": problem}, {}) for problem in problems)
    print(table(found if options.all else [item for item in found if item.verdict != "same"]))
    print("\n".join([*summary(found), *problems]))
    if any(item.group in required for item in failed):
        print("Bars are no records: they are in bench/metrics.py.")
    if any(item.group not in required for item in failed):
        print(f"If this is meant: {ANEW}, and commit what it writes.")
    elif any(item.verdict == "better" and item.group not in required for item in found):
        print(f"Better than recorded: {ANEW} keeps it so.")
    return status


def _case(item: Finding) -> dict[str, Any]:
    return {"group": item.group, "subject": item.subject, "kind": item.kind, "unit": item.unit}


def _values(item: Finding) -> dict[str, Any]:
    return {"recorded": item.recorded, "now": item.now, "limit": item.limit, "verdict": item.verdict}


def update(options: argparse.Namespace, measured: Callable[[str], Group]) -> int:
    """Record the chosen groups and print what changed; the others stay as they are, and bars are not recorded."""
    only = [name for name in options.only if name not in metrics.required()]
    if not only:
        raise InputError(f"{', '.join(options.only)}: judged by bars in bench/metrics.py, not recorded")
    try:
        recorded = baseline.read(options.baseline)
    except InputError:
        if options.baseline.exists() and options.only != list(metrics.GROUPS):
            raise  # what is not measured now would be lost
        recorded = {}
    groups = dict(recorded)
    for name in only:
        runs = UPDATE_RUNS if name in metrics.REPEATED else 1
        groups[name] = baseline.settle([measured(name) for _ in range(runs)])
    baseline.write(options.baseline, {name: groups[name] for name in metrics.GROUPS if name in groups})
    for name in only:
        print(f"{name}: {changes(recorded.get(name), groups[name])}")
    return 0


def changes(before: Group | None, after: Group) -> str:
    """Return a sentence for everything that is recorded otherwise now."""
    if before is None:
        return f"{count(sum(map(len, after.values.values())), 'figure')} recorded for the first time"
    lines = [baseline.differences(before.versions | before.machine, after.versions | after.machine)]
    for subject in {**before.values, **after.values}:
        old, new = before.values.get(subject, {}), after.values.get(subject, {})
        for kind in {**old, **new}:
            if old.get(kind) != new.get(kind):
                lines.append(f"{subject}, {kind}: {figure(old.get(kind))} -> {figure(new.get(kind))}")
    for kind in before.kinds.keys() | after.kinds.keys():
        if before.kinds.get(kind) != after.kinds.get(kind):
            lines.append(f"what {kind!r} is, or its noise")
    return "\n  ".join(["changed:", *filter(None, lines)]) if any(lines) else "nothing changed"


def _measured(name: str, folder: Path, measure: Measure) -> Group:
    print(f"measuring: {name}", file=sys.stderr, flush=True)
    return measure(name, folder)


def _compared(name: str, recorded: Group, measured: Callable[[str], Group]) -> list[Finding]:
    """Return the group's findings; if it varies and looks worse, those of the median of three measurements."""
    runs = [measured(name)]
    found = baseline.compare(name, recorded, runs[0])
    if name in metrics.REPEATED and any(item.verdict == "WORSE" for item in found):
        runs += [measured(name), measured(name)]
        found = baseline.compare(name, recorded, baseline.settle(runs))
    if recorded.machine != runs[0].machine:
        print(f"{name}: {baseline.differences(recorded.machine, runs[0].machine)}: shown, not judged")
    return found


def table(found: Iterable[Finding]) -> str:
    """Old, new, what is allowed, verdict: a line each; empty if there are none."""
    rows = [
        (f"{item.group}: {item.subject}, {item.kind}", figure(item.recorded), figure(item.now), figure(item.limit),
         item.unit, item.verdict)
        for item in found
    ]  # fmt: skip
    if not rows:
        return ""
    rows.insert(0, ("figure", "recorded", "now", "allowed", "unit", "verdict"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if 1 <= n <= 3 else cell.ljust(width) for n, (cell, width) in
                  enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip


def summary(found: Sequence[Finding]) -> list[str]:
    """Return a line per group: how many figures have which verdict."""
    groups: dict[str, dict[str, int]] = {}
    for item in found:
        verdicts = groups.setdefault(item.group, {})
        verdicts[item.verdict] = verdicts.get(item.verdict, 0) + 1
    return [f"{name}: {_told(verdicts)}" for name, verdicts in groups.items()]


def _told(verdicts: Mapping[str, int]) -> str:
    words = {"same": "as recorded", "noise": "within the noise"}
    parts = ", ".join(f"{number} {words.get(verdict, verdict)}" for verdict, number in verdicts.items())
    return f"{count(sum(verdicts.values()), 'figure')}: {parts}"


def figure(value: float | None) -> str:
    """Return a number for a table: whole and large ones with separators, others with four digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it has to be."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    sys.exit(main())
