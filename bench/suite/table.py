"""Results of a run of the suite, for people and for programs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.suite.backends import BACKENDS, OWN
from bench.tools.results import Scalar
from dia_fast.utils.files import replacing

Run = Mapping[str, Any]  # pytest-benchmark's JSON, with `verdicts` and `complete`


def write(folder: Path, run: Run) -> None:
    """suite.json, which pytest-benchmark can compare with, and suite.md. Raises InputError."""
    for name, text in (("suite.json", json.dumps(run, indent=1)), ("suite.md", markdown(run))):
        with replacing(folder / name) as temporary:
            temporary.write_text(text)


def markdown(run: Run) -> str:
    """Return a table: a row for each op or stage at a shape, backends side by side.

    Before it stands what is wrong or raised, behind it what was not measured, and an earlier run.
    """
    without = {
        (item["group"], item["backend"]): item["outcome"]
        for item in run["verdicts"]
        if item["outcome"] in ("wrong", "failed")
    }
    lines = [*_machine(run), *_wrong(run), *_failed(run)]
    groups: dict[str, dict[str, Any]] = {}
    for benchmark in run["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["extra_info"]["backend"]] = benchmark
    names = list(dict.fromkeys([*groups, *(group for group, _ in without)]))
    backends = [
        name
        for name in (*BACKENDS, OWN)
        if any(name in group for group in groups.values()) or any(name == backend for _, backend in without)
    ]
    heads = [f"{name}, µs (spread) | {name}, share of bandwidth, compute" for name in backends]
    lines += ["", f"| what | MB | MFLOP | {' | '.join(heads)} |", "|---|---:|---:|" + "---:|" * (2 * len(backends))]
    for name in names:
        found = groups.get(name, {})
        facts = next(iter(found.values()))["extra_info"] if found else {"bytes": 0, "operations": 0}
        cells = [_cell(found.get(backend), without.get((name, backend))) for backend in backends]
        sizes = f"{facts['bytes'] / 1e6:.3g} | {facts['operations'] / 1e6:.3g}" if found else " | "
        lines.append(f"| {name} | {sizes} | {' | '.join(cells)} |")
    return "\n".join(lines + _skipped(run) + _compared(run)) + "\n"


def figures(run: Run) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield case and values of everything that was timed, or is wrong, failed or was skipped."""
    for item in run["benchmarks"]:
        facts = {name: value for name, value in item["extra_info"].items() if isinstance(value, Scalar)}
        times = {f"{name}_s": item["stats"][name] for name in ("median", "iqr", "min")} | {
            "rounds": item["stats"]["rounds"]
        }
        yield {"what": item["group"], "backend": facts.pop("backend")}, times | facts
    for item in run["verdicts"]:
        if item["outcome"] != "ok":
            case = {"what": item["group"], "backend": item["backend"]}
            yield case, {"outcome": item["outcome"], "detail": item["detail"]}


def medians(run: Run) -> dict[tuple[str, str], float]:
    """Seconds by what was measured and on which backend. Raises KeyError or TypeError if it is no run of the suite."""
    return {(item["group"], item["extra_info"]["backend"]): item["stats"]["median"] for item in run["benchmarks"]}


def compared(before: Run, run: Run, percent: float | None) -> list[dict[str, Any]]:
    """Compare what both runs measured. slower: a median is more than so many percent above the earlier one."""
    old, most = medians(before), float("inf") if percent is None else 1 + percent / 100
    return [
        {"group": key[0], "backend": key[1], "before": old[key], "now": now, "slower": now > old[key] * most}
        for key, now in medians(run).items()
        if key in old
    ]


def _machine(run: Run) -> list[str]:
    machine = run["machine_info"]
    if not machine:
        return ["Nothing was measured."]
    peaks = machine["measured"]
    state = "" if run["complete"] else " **The run was broken off: some is missing.**"
    if machine["vectors"] == "none":
        state += (
            " torch.compile found no vector instructions that the compiler here can make: what it made is slower than "
            "what it makes elsewhere."
        )
    line = (
        f"{machine['device']}; torch {machine['torch']}, triton {machine['triton']}; {machine['dtype']}, "
        f"{machine['size']}. The device itself reads {peaks['bandwidth'] / 1e9:.1f} GB/s and multiplies "
        f"{peaks['compute'] / 1e12:.3g} TFLOP/s: shares are of these.{state}"
    )
    return [line]


def _cell(benchmark: Mapping[str, Any] | None, outcome: str | None) -> str:
    """outcome: why there is no time, if there should be one."""
    if outcome is not None:
        return f"**{outcome}** | "
    if benchmark is None:
        return "- | "
    stats, facts = benchmark["stats"], benchmark["extra_info"]
    median, spread = stats["median"] * 1e6, stats["iqr"] * 1e6
    shares = f"{facts['share_of_bandwidth']:.0%}, {facts['share_of_compute']:.1%}"
    return f"{median:.4g} ({spread:.2g}) | {shares}"


def _wrong(run: Run) -> list[str]:
    found = [item for item in run["verdicts"] if item["outcome"] == "wrong"]
    if not found:
        return []
    return ["", "**Wrong results, therefore no times:**", ""] + [
        f"- {item['group']} on {item['backend']}: {item['detail']}" for item in found
    ]


def _failed(run: Run) -> list[str]:
    """Each reason once, with the first that it stopped."""
    stopped: dict[tuple[str, str], list[str]] = {}
    for item in run["verdicts"]:
        if item["outcome"] == "failed":
            stopped.setdefault((item["backend"], item["detail"]), []).append(item["group"])
    if not stopped:
        return []
    return ["", "**Raised, therefore no times:**", ""] + [
        f"- {groups[0]}{f' and {len(groups) - 1} more' if len(groups) > 1 else ''} on {backend}: {detail}"
        for (backend, detail), groups in stopped.items()
    ]


def _compared(run: Run) -> list[str]:
    if "compared" not in run:
        return []
    lines = ["", "Beside an earlier run:", "", "| what | backend | before, µs | now, µs | change |"]
    lines.append("|---|---|---:|---:|---:|")
    for item in run["compared"]:
        change = f"{item['now'] / item['before'] - 1:+.1%}"
        lines.append(
            f"| {item['group']} | {item['backend']} | {item['before'] * 1e6:.4g} | {item['now'] * 1e6:.4g} | "
            f"{f'**{change}, slower than allowed**' if item['slower'] else change} |"
        )
    return lines


def _skipped(run: Run) -> list[str]:
    """Each reason once, with how much it stands for."""
    counts: dict[tuple[str, str], int] = {}
    for item in run["verdicts"]:
        if item["outcome"] == "skipped":
            counts[item["backend"], item["detail"]] = counts.get((item["backend"], item["detail"]), 0) + 1
    if not counts:
        return []
    return ["", "Not measured:", ""] + [
        f"- {backend}, {count} times: {detail}" for (backend, detail), count in counts.items()
    ]
