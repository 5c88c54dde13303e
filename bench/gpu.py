"""Everything that a machine with a GPU can say, in one folder: is it right, and how fast is it?

    python -m bench.gpu [--out FOLDER] [--budget 720] [--device cuda] [--model FOLDER] [--only PART ...]

`make bench-gpu` runs it. Each part is a process with a time limit of its own: one that fails, hangs or crashes is
reported as such and the others go on. Where a check finds wrong results, the report says so and no speed is given for
them. The weights are random, made here: only their sizes matter for time. See docs/benchmarks.md for how to read it.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.parts import ROOT, Interrupted, Part, Result, Runner, clean, installed, scrub
from bench.report import DOCTOR, Report
from dia_fast.errors import DiaFastError, InputError

CANDIDATES = [str(path) for path in sorted((ROOT / "bench" / "candidates").glob("*.json"))]
ROWS_AND_WEIGHTS = ("1", "2", "16", "64", "--weights", "float", "int8")
DISK = 4_000_000_000  # bytes that the random weights need, about
EXAMPLES = """\
examples:
  python -m bench.gpu
  python -m bench.gpu --out report --budget 300 --only doctor parity suite
  python -m bench.gpu --model dia-1.6b             weights that are there already, in place of random ones

exit status: 0 all is right and was measured; 1 something failed, is wrong or had no time; 2 wrong options, or no GPU;
130 interrupted
"""


def all_parts(options: argparse.Namespace, folder: Path, weights: Path) -> list[Part]:
    """Return the parts in the order in which they matter: the last ones are left out when the time is over."""
    device = ("--device", options.device)
    model, thin = ("--model", options.model or str(weights)), ("--layers", "1") if options.quick else ()
    against = ("--against", "transformers") if installed("transformers") else ()
    quick = ("--quick",) if options.quick else ()
    workers = ("-n", "4") if installed("xdist") else ()
    step = ("--steps", "4", "--rounds", "1") if options.quick else ("--steps", "32", "--rounds", "2")

    def part(name: str, shows: str, limit: float, module: str, *command: str, **more: Any) -> Part:
        return Part(name, ("-m", module, *command), limit, shows, **more)

    few = ("--layers", "1", "--steps", "6") if options.quick else ()
    sound = ("--rounds", "1", "--steps", "24", "--chunks", "0.1") if options.quick else ("--rounds", "2")
    batches = ("--requests", "1", "2") if options.quick else ()
    layout = ("--layout", "original") if installed("dia") else ()  # which dia-fast reads as well

    def measured(name: str, shows: str, limit: float, module: str, *command: str, **more: Any) -> Part:
        return part(name, shows, limit, module, *command, "--json", str(folder / f"{name}.json"), **more)

    def whole_step(name: str, shows: str, limit: float, *rows: str) -> Part:
        return measured(name, shows, limit, "bench.ablation", *device, *thin, "--whole", "--rows", *rows, speed=True)

    def weights_part() -> list[Part]:
        if options.model is not None:
            return []
        return [part("weights", "makes random weights, 3.2 GB", 90, "bench.make_checkpoint", str(weights), *layout)]

    return [
        part("tests", "every kernel test; the log names each", 180, "pytest", "-v", "tests/kernels", "-p",
             "no:cacheprovider", *workers, needs=("pytest", "hypothesis", "pytest_timeout")),
        part("doctor", "every kernel against its reference", 90, "dia_fast", "doctor", *device, "--json",
             output=DOCTOR),
        whole_step("baseline", "a captured step of one guided request, by the default configs", 60, "2"),
        whole_step("candidates", "configs that were never measured, beside the default ones", 90, "2", "16", "64",
                   "--table", *CANDIDATES),
        measured("residency", "launches whose programs are resident ahead of time", 30, "bench.residency", *device),
        measured("parity", "tokens and logits in fp32, fp16 and bf16, with graphs and without", 90, "bench.parity",
                 *device, *few),
        whole_step("rows", "captured steps of 1, 2, 16 and 64 rows, in 16 bits and in 8", 90, *ROWS_AND_WEIGHTS),
        *weights_part(),
        measured("step", "a decode step beside that of transformers", 75, "bench.decode_step", *device, *model,
                 *against, *step, speed=True),
        measured("throughput", "frames per second over the number of requests", 75, "bench.throughput", *device,
                 *model, *against, "--rounds", "1", "--out", str(folder / "throughput"), *batches,
                 needs=("matplotlib",), speed=True),
        measured("latency", "time to the first sound", 45, "bench.latency", *device, *model, *sound, speed=True),
        measured("serving", "1, 8 and 32 streams at once, the codec included", 75, "bench.serving", *device, *model,
                 "--codec", "random", speed=True),
        measured("long_sound", "memory and time of decoding 36 s", 30, "bench.long_sound", *device, speed=True),
        part("sanitizer", "a captured step under compute-sanitizer", 90, "bench.sanitizer", *device,
             programs=("compute-sanitizer",)),
        measured("suite", "every kernel, step and stage beside torch and torch.compile", 220, "bench.suite", *device,
                 *quick, "--out", str(folder / "suite"), "--limit", "180", needs=("pytest", "pytest_benchmark")),
        measured("ablation", "time that each op of a step takes", 60, "bench.ablation", *device, *thin, speed=True),
        measured("ragged", "requests of different lengths, one after another", 60, "bench.ragged", *device, *model,
                 *against, "--gap", "0.1", "--steps", "50", "200", speed=True),
        part("plan", "measured beside predicted", 60, "dia_fast", "plan", *device, "--measure", "--plots",
             str(folder / "plan"), needs=("matplotlib",), speed=True),
        measured("original", "a decode step beside that of the original package", 75, "bench.original", *device,
                 *model, *step, needs=("dia",), speed=True),
    ]  # fmt: skip


def chosen_parts(parts: Sequence[Part], only: Sequence[str] | None) -> list[Part]:
    """Those that `--only` names, and what they cannot do without. Raises InputError for a name that is none."""
    if not only:
        return list(parts)
    names = [part.name for part in parts]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise InputError(f"--only: there is no part {unknown[0]!r}; there are {', '.join(names)}")
    wanted = {*only, *(["weights"] if any(_reads_model(part) for part in parts if part.name in only) else [])}
    return [part for part in parts if part.name in wanted]


def _reads_model(part: Part) -> bool:
    return "--model" in part.command


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware, from a process of its own: what it does to the GPU ends with it. Raises InputError."""
    try:
        command = [sys.executable, "-m", "bench.environment", device]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"the device {device!r} does not answer: it said nothing for a minute") from None
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise InputError(f"the device {device!r} cannot be used: {scrub(said)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def obstacle(part: Part, report: Report, results: Sequence[Result]) -> str | None:
    """Name the reason why a part is not begun: what it builds on is missing or wrong."""
    wrong = report.wrong()
    if part.speed and wrong:
        return f"results are wrong on this machine, so speeds mean nothing: {wrong[0]}"
    if _reads_model(part) and any(result.name == "weights" and result.status != "ok" for result in results):
        return "there are no weights"
    if part.name == "weights" and shutil.disk_usage(Path(part.command[2]).parent).free < DISK:
        return f"the disk for temporary files has no {DISK / 1e9:.0f} GB free; name another one with --scratch"
    return None


def run(parts: Sequence[Part], report: Report, budget: float, hidden: Mapping[Path, str] | None = None) -> int:
    """Run all parts, write the report after each, and return the exit status. hidden: folders that it must not name."""
    hidden = {report.folder: "<report>"} | dict(hidden or {})
    runner = Runner(report.folder, budget, hidden=hidden)
    results = report.results = [Result(part.name) for part in parts]
    started = time.monotonic()
    try:
        for index, part in enumerate(parts):
            print(f"{part.name}: {part.shows} ...", flush=True)
            reason = obstacle(part, report, results[:index])
            if part.name == "suite" and report.distrusted():
                part = replace(part, command=(*part.command, "--distrust", *report.distrusted()))
            results[index] = runner.run(part) if reason is None else Result(part.name, "left out", reason)
            clean(report.folder, hidden)
            report.seconds = round(time.monotonic() - started, 1)
            report.write()
            done = results[index]
            print(f"  {done.status}, {done.seconds:.0f} s{': ' + done.reason if done.reason else ''}", flush=True)
        report.finished = True
    except (Interrupted, KeyboardInterrupt) as stop:
        report.interrupted = True
        if isinstance(stop, Interrupted):
            results[[part.name for part in parts].index(stop.result.name)] = stop.result
    finally:
        for left in list(report.folder.rglob(".*.part")):  # of parts that were ended before they could clean up
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        clean(report.folder, hidden)
        report.seconds = round(time.monotonic() - started, 1)
        report.write()
    return report.status()


def hidden_folders(options: argparse.Namespace, scratch: Path) -> dict[Path, str]:
    """Folders that were named or made for a run, with what stands for them in a report."""
    hidden = {scratch: "<scratch>"}
    if options.scratch is not None:
        hidden[options.scratch] = "<scratch>"
    if options.model is not None and (model := Path(options.model)).is_absolute():
        hidden[model if model.is_dir() else model.parent] = "<model>"
    return hidden


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.gpu",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=720.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--model", help="folder, file or Hub id (default: random weights, made for the run)")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: whether everything runs")
    parser.add_argument("--scratch", type=Path, help="folder for the random weights (default: that of temporary files)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.scratch and not options.scratch.is_dir():
        parser.error(f"--scratch: there is no folder {options.scratch}")
    if options.model and (model := Path(options.model).expanduser()).exists():
        options.model = str(model.absolute())  # parts run in the root of the repository
    if options.scratch:
        options.scratch = options.scratch.absolute()
    with tempfile.TemporaryDirectory(prefix="dia-fast-", dir=options.scratch) as scratch:
        try:
            folder = options.out.resolve()
            parts = chosen_parts(all_parts(options, folder, Path(scratch) / "weights"), options.only)
            report = Report(folder, parts, environment(options.device))
            report.begin()
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                status = run(parts, report, options.budget, hidden_folders(options, Path(scratch)))
            finally:
                signal.signal(signal.SIGTERM, before)
        except DiaFastError as error:
            print(f"bench.gpu: {error}", file=sys.stderr)
            return 2
    print(f"report: {options.out / 'report.md'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
