"""Figures recorded in a file, and when a new one is worse than the recorded one by more than its noise."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dia_fast.errors import InputError
from dia_fast.utils.files import replacing

FORMAT = 1
BETTER = ("lower", "higher")


@dataclass(frozen=True)
class Kind:
    """Meaning of a figure, and the difference that counts.

    better: which way is better, `lower` or `higher`. share, amount: a figure is worse when it differs from the recorded
    one in the other direction by more than `share * recorded + amount`. source: where that allowance comes from.
    """

    unit: str
    better: str
    share: float
    amount: float
    source: str

    def limit(self, recorded: float) -> float:
        """Return the last value that is not worse."""
        allowed = self._allowed(recorded)
        return recorded + allowed if self.better == "lower" else recorded - allowed

    def verdict(self, recorded: float, now: float) -> str:
        """Return `same`, `noise`, `better` or `WORSE`; NaN is worse."""
        if now == recorded:
            return "same"
        loss = now - recorded if self.better == "lower" else recorded - now
        allowed = self._allowed(recorded)
        if math.isnan(now) or loss > allowed:
            return "WORSE"
        return "better" if loss < -allowed else "noise"

    def _allowed(self, recorded: float) -> float:
        return self.share * abs(recorded) + self.amount


@dataclass(frozen=True)
class Group:
    """Figures taken together: `values[subject][kind]`.

    versions: of what decides them; they are pinned, so with another version they cannot be compared. machine: what of
    the machine decides them; on another one they are shown, and not judged.
    """

    kinds: dict[str, Kind]
    values: dict[str, dict[str, float]]
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One figure: verdict as `Kind.verdict`, or `MISSING` (recorded only), `NEW` (measured only), `not judged`."""

    group: str
    subject: str
    kind: str
    unit: str
    recorded: float | None
    now: float | None
    limit: float | None
    verdict: str

    @property
    def fails(self) -> bool:
        return self.verdict in ("WORSE", "MISSING", "NEW")


def settle(runs: Sequence[Group]) -> Group:
    """Return the medians of repeated measurements of one group, with twice the largest deviation from them as noise.

    What the kinds allow already stays allowed: few quiet runs say little of a busy machine.
    """
    if len(runs) == 1:
        return runs[0]
    first = runs[0]
    values = {
        subject: {kind: statistics.median(run.values[subject][kind] for run in runs) for kind in figures}
        for subject, figures in first.values.items()
    }
    kinds = dict(first.kinds)
    for name, kind in first.kinds.items():
        pairs = [
            (abs(run.values[subject][name] - figures[name]), abs(figures[name]))
            for run in runs
            for subject, figures in values.items()
            if figures.get(name) and math.isfinite(figures[name]) and math.isfinite(run.values[subject][name])
        ]
        # What `amount` covers needs no share: of a small figure it would be large, and be allowed to all.
        share = max(((2 * deviation - kind.amount) / median for deviation, median in pairs), default=0.0)
        largest = max((deviation / median for deviation, median in pairs), default=0.0)
        if largest:
            source = f"{kind.source}; at least twice the largest deviation of {len(runs)} runs, {largest:.1%}"
            kinds[name] = replace(kind, share=max(kind.share, math.ceil(1e3 * share) / 1e3), source=source)
    return replace(first, kinds=kinds, values=values)


def differences(recorded: Mapping[str, str], now: Mapping[str, str]) -> str:
    """`triton 3.7.1, here 3.9.0`, and so on; empty if there are none."""
    names = sorted({**recorded, **now})
    return "; ".join(
        f"{name} {recorded.get(name, 'none')}, here {now.get(name, 'none')}"
        for name in names
        if recorded.get(name) != now.get(name)
    )


def compare(name: str, recorded: Group, now: Group) -> list[Finding]:
    """Every figure of a group beside the recorded one, judged by the recorded allowance.

    Raises InputError if they cannot be compared: other versions, or a kind of figure that means something else now.
    """
    changed = differences(recorded.versions, now.versions)
    if changed:
        raise InputError(f"{name}: recorded with {changed}; install what was recorded, or record anew with --update")
    for kind in sorted(recorded.kinds.keys() & now.kinds.keys()):
        before, after = recorded.kinds[kind], now.kinds[kind]
        if (before.unit, before.better) != (after.unit, after.better):
            raise InputError(
                f"{name}: {kind!r} was recorded in {before.unit} ({before.better} is better) and is now in "
                f"{after.unit} ({after.better} is better); record anew with --update"
            )
    judged = recorded.machine == now.machine
    found = []
    for subject in [*recorded.values, *(subject for subject in now.values if subject not in recorded.values)]:
        old, new = recorded.values.get(subject, {}), now.values.get(subject, {})
        for figure in [*old, *(figure for figure in new if figure not in old)]:
            was, became = old.get(figure), new.get(figure)
            meaning = (now if was is None else recorded).kinds[figure]
            limit = None if was is None else meaning.limit(was)
            if was is None or became is None:
                verdict = "NEW" if was is None else "MISSING"
            else:
                verdict = meaning.verdict(was, became) if judged else "not judged"
            found.append(Finding(name, subject, figure, meaning.unit, was, became, limit, verdict))
    return found


def write(path: Path, groups: Mapping[str, Group]) -> None:
    """Write the file whole or not at all; a subject is one line, so that a diff is read easily."""
    parts = [f' "format": {FORMAT}']
    for name, group in groups.items():
        kinds = {kind: asdict(meaning) for kind, meaning in group.kinds.items()}
        lines = [
            f'  "versions": {json.dumps(group.versions)}',
            f'  "machine": {json.dumps(group.machine)}',
            f'  "kinds": {_lines(kinds)}',
            f'  "values": {_lines(group.values)}',
        ]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _lines(table: Mapping[str, Any]) -> str:
    inside = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    return "{\n" + inside + "\n  }"


def read(path: Path) -> dict[str, Group]:
    """Read a baseline that `write` wrote. Raises InputError that says what is wrong with the file."""
    again = "python -m bench.check --update makes a new one"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; {again}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # of JSON, and of UTF-8
        raise InputError(f"{path} is not JSON ({error}); {again}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"{path} is no baseline of format {FORMAT}; {again}")
    try:
        return {name: group_of(item) for name, item in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from error


def group_of(item: Mapping[str, Any]) -> Group:
    """Return a group from its JSON. Raises one of AttributeError, KeyError, TypeError, ValueError if it is none."""
    kinds = {name: Kind(**kind) for name, kind in item["kinds"].items()}
    for name, kind in kinds.items():
        if kind.better not in BETTER:
            raise ValueError(f"{name}: better is {kind.better!r}, not one of {', '.join(BETTER)}")
        if not (_is_number(kind.share) and _is_number(kind.amount) and kind.share >= 0 and kind.amount >= 0):
            raise ValueError(f"{name}: share and amount are {kind.share!r} and {kind.amount!r}")
    values = {subject: dict(figures) for subject, figures in item["values"].items()}
    for subject, figures in values.items():
        for name, value in figures.items():
            if name not in kinds:
                raise ValueError(f"{subject}: {name!r} is none of the kinds {', '.join(kinds)}")
            if not _is_number(value):
                raise ValueError(f"{subject}: {name} is {value!r}, not a finite number")
    return Group(kinds, values, dict(item["versions"]), dict(item["machine"]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
