"""Runs the suite: pytest with the options that fit, then a table and plots of what it wrote."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.suite import backends, table
from bench.tools.own_ops import add_ops_option, chosen_ops
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError, InputError
from dia_fast.model.device import choose_device, choose_dtype

FOLDER = Path(__file__).resolve().parent
CONFIG = str(FOLDER / "pytest.ini")
EXAMPLES = """\
examples:
  python -m bench.suite --quick
  python -m bench.suite --device cuda --dtype bf16 --out before
  python -m bench.suite --out after --compare before/suite.json --fail-at 10
  python -m bench.suite --backends triton -- -k "rope_attention and context-1024"
  python -m bench.suite --ops examples.own_glu --backends torch triton -- -k glu

exit status: 0 everything was measured; 1 a backend computes something else, raises, or is slower than allowed; 2 wrong
options
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.suite",
        description="Times every kernel and stage of Dia-1.6B on every backend.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/suite"), help="folder (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (the GPU if there is one)")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--backends", nargs="+", choices=backends.BACKENDS, default=backends.BACKENDS)
    parser.add_argument("--quick", action="store_true", help="an eighth of the width, one context: whether all runs")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds; what is left then is skipped")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="suite.json of an earlier run")
    parser.add_argument("--fail-at", type=float, metavar="PERCENT", help="fail if a median is that much slower")
    parser.add_argument(
        "--distrust", nargs="+", default=[], metavar="OP", help='kernels, or "model", known to be wrong'
    )
    add_ops_option(parser)
    add_options(parser)
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    return parser


def pytest_arguments(options: argparse.Namespace, saved: Path, verdicts: Path) -> list[str]:
    """Return the command. saved, verdicts: files that pytest is to write."""
    timed = [*options.backends, *([backends.OWN] if options.ops else [])]
    given = [
        str(FOLDER), "-q", "--no-header", "-p", "no:cacheprovider",
        f"--benchmark-json={saved}", "--benchmark-storage=.", "--benchmark-columns=median,iqr,min,rounds",
        "--benchmark-sort=name", f"--bench-backends={','.join(timed)}", f"--bench-verdicts={verdicts}",
        f"--bench-limit={options.limit}", f"--bench-distrust={','.join(options.distrust)}", "--no-summary",
        "--benchmark-quiet", "-c", CONFIG,
    ]  # fmt: skip
    for name in ("device", "dtype", "ops"):
        if getattr(options, name):
            given.append(f"--bench-{name}={getattr(options, name)}")
    if options.quick:
        given.append("--bench-quick")
    return given + options.pytest


def run(options: argparse.Namespace, results: Results) -> int:
    """Run pytest and write suite.json, suite.md and the plots. Raises InputError."""
    import importlib.util

    import pytest

    if importlib.util.find_spec("pytest_benchmark") is None:
        raise InputError("the suite needs pytest-benchmark: pip install '.[bench]'")
    if options.fail_at is not None and not options.compare:
        raise InputError("--fail-at needs --compare with an earlier run")
    choose_dtype(options.dtype, choose_device(options.device))  # what pytest would say takes longer to read
    chosen_ops(options.ops)
    before = earlier(options.compare) if options.compare else None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot write to {options.out}: {error.strerror}") from error
    saved, verdicts = (options.out / f".{name}.part" for name in ("suite", "verdicts"))
    try:
        status = int(pytest.main(pytest_arguments(options, saved, verdicts)))
        if not verdicts.exists():  # pytest has said what it did not like
            return 2 if status == pytest.ExitCode.USAGE_ERROR else status or 1
        noted = json.loads(verdicts.read_text())
        run: dict[str, Any] = {"benchmarks": [], "machine_info": {}}
        if saved.exists():
            run = json.loads(saved.read_text())
        run |= {"verdicts": noted, "complete": status in (0, 1)}
        if before is not None:
            run["compared"] = table.compared(before, run, options.fail_at)
        table.write(options.out, run)
    finally:
        for file in (saved, verdicts):
            with contextlib.suppress(OSError):
                file.unlink()
    results.extend(table.figures(run))
    print(table.markdown(run))
    if run["benchmarks"]:
        draw(run, options.out)
    print(f"written to {options.out}: suite.json, suite.md, and plots in the light and the dark")
    return status or int(options.fail_at is not None and regressed(run["compared"]))


def earlier(path: Path) -> dict[str, Any]:
    """Return the suite.json of another run. Raises InputError if it is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        table.medians(found)
    except FileNotFoundError:
        raise InputError(f"--compare: there is no file {path}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--compare: {path} is no suite.json of this suite: {type(error).__name__}: {error}") from None
    return found


def regressed(compared: Sequence[dict[str, Any]]) -> bool:
    """Return True if a median is slower than allowed, or there is none to compare."""
    if not compared:
        print("nothing was measured in both runs: whether anything is slower is not known", file=sys.stderr)
    return not compared or any(item["slower"] for item in compared)


def draw(run: dict[str, Any], folder: Path) -> None:
    """Draw the plots, where matplotlib is installed; a run is not lost for want of one."""
    from bench import plots

    try:
        plots.draw_suite(run, folder)
    except InputError as error:
        print(f"no plots: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        results = Results(parser, options, arguments, choose_device(options.device))
        return results.end(run(options, results))
    except DiaFastError as error:
        print(f"bench.suite: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
