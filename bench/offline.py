"""Judge configs by the machine code that they give, for a GPU that is not there: `python -m bench.tune --target sm_90`.

Every candidate of every launch of a step is compiled, read as `bench.codegen` reads it, and held to the same rules:
spills, shared memory, width of loads, issue slots, bytes in flight. What does not compile, or breaks a rule, is a line.
The table that is written holds, for each launch, the sound candidate with the most bytes of weights in flight, of equal
ones that with the fewest issue slots; a launch whose default is as good is left out. No candidate of a projection
changes the order of its sums, so that their bits stay. Which one is fastest, only a GPU tells.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from bench import tune
from bench.codegen import Line, line, violations
from bench.measure import DTYPES
from bench.tools.own_ops import chosen_ops
from bench.tools.results import Results
from bench.tune import Config, Launch
from dia_fast.errors import DiaFastError, InputError
from dia_fast.model.config import DiaConfig
from dia_fast.model.quantization import FLOAT
from dia_kernels import aot
from dia_kernels.triton import gemv


@dataclass(frozen=True)
class Job:
    """One candidate. use: None for the default. table: file with it."""

    target: str
    dtype: str
    rows: int
    launch: Launch
    use: Config | None
    table: str
    weights: str = FLOAT
    own: str | None = None
    config: DiaConfig | None = None


@dataclass(frozen=True)
class Judged:
    """The result of a job. problems: rules that it breaks, or why it did not compile; line: None if it did not."""

    job: Job
    problems: tuple[str, ...]
    line: Line | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better."""
        assert self.line is not None
        return self.line.in_flight, -self.line.issue


def jobs(options: argparse.Namespace, config: DiaConfig, folder: Path) -> Iterator[Job]:
    """Yield the default and every candidate of each launch."""
    done: set[tuple[str, str, Any]] = set()
    numbers = itertools.count()
    for rows in options.rows:
        for launch in tune.launches(rows, options.dtype, options.only, options.weights, config):
            if (launch.kind, launch.op, launch.where) in done:
                continue
            done.add((launch.kind, launch.op, launch.where))
            for use in (None, *tune.candidates(launch, _order(launch, options))):
                entries = [] if use is None else [(launch, use)]
                table = tune.write_table(folder / f"{next(numbers)}.json", entries)
                known = options.target, options.dtype, rows, launch, use, str(table), options.weights, options.ops
                yield Job(*known, config)


def _order(launch: Launch, options: argparse.Namespace) -> Sequence[tuple[int, int]]:
    """Return the order of a projection's sums that the target's default has."""
    if launch.op not in gemv.OPS:
        return ()
    where = dict(launch.where)
    shape = {name: where[name] for name in ("rows", "features", "hidden", "weight_bits")}
    use = gemv.default_config(launch.op, DTYPES[options.dtype], options.target, **shape)
    return [(use["SPLIT_K"], use["CHUNKS"])]


def judge(job: Job) -> Judged:
    """Compile a candidate and read it; nothing that goes wrong is raised."""
    os.environ["DIA_KERNELS_TABLE"] = job.table
    from dia_fast.diagnostics import launches as steps

    try:
        with aot.compiling(job.target) as compiled:
            ops = tune.only_op(job.launch.op, job.own)
            model = steps.one_layer(DTYPES[job.dtype], ops, job.config, job.weights)
            steps.decode(job.rows, DTYPES[job.dtype], model=model)
        found = line(_meant(compiled, job.launch), job.target, job.dtype, job.rows)
    except Exception as error:
        return Judged(job, (tune.told(error),))
    return Judged(job, tuple(problem.partition(": ")[2] for problem in violations(found)), found)


def _meant(compiled: Sequence[aot.Compiled], launch: Launch) -> aot.Compiled:
    """Return the launch of a step that an entry of a table is for."""
    where = dict(launch.where)
    for item in compiled:
        weight = item.arguments.get("weight_ptr")
        if weight is None or (
            tuple(weight.shape) == (where["features"], where["hidden"])
            and item.arguments["x_ptr"].shape[0] == where["rows"]
        ):
            return item
    raise ValueError(f"no launch of the step is {where}")


def best(judged: Sequence[Judged]) -> list[tuple[Launch, Config]]:
    """Return the entries of the table."""
    entries = []
    for _, group in itertools.groupby(judged, key=lambda item: item.job.launch):
        default, *others = group
        sound = [item for item in others if not item.problems]
        chosen = max(sound, key=lambda item: item.rank, default=None)
        if chosen and chosen.job.use and (default.problems or chosen.rank > default.rank):
            entries.append((chosen.job.launch, chosen.job.use))
    return entries


def _result(item: Judged) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return case and values of a candidate."""
    use = " ".join(f"{name}={value}" for name, value in item.job.use.items()) if item.job.use else "default"
    values: dict[str, Any] = {"problems": "; ".join(item.problems) or None}
    if item.line:
        for name in ("registers", "spills", "shared", "occupancy", "weight_bits", "in_flight", "issue", "instructions"):
            values[name] = getattr(item.line, name)
    return {"target": item.job.target, "rows": item.job.rows, "launch": item.job.launch.name, "use": use}, values


def _told(item: Judged) -> str:
    case, values = _result(item)
    start = f"{case['rows']} rows, {case['launch']}: {case['use']}: "
    if item.problems:
        return start + f"out: {'; '.join(item.problems)}"
    assert item.line is not None
    figures = f"{values['registers']} registers, {item.line.occupancy:.0%} occupancy"
    if item.line.projection:
        figures += f", {item.line.in_flight / 1024:.0f} KB in flight, {item.line.issue:.0%} of issue slots"
    return start + figures


def run(parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    """Judge all candidates and write the table; return the exit status."""
    try:
        if triton.knobs.runtime.interpret:
            raise InputError("TRITON_INTERPRET is set: Triton compiles nothing then; unset it")
        chosen_ops(options.ops)
        config = tune.model_config(options)
        results = Results(parser, options, arguments)
    except DiaFastError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    judged: list[Judged] = []
    with tempfile.TemporaryDirectory(prefix="dia-fast-") as folder:
        todo = list(jobs(options, config, Path(folder)))
        with ProcessPoolExecutor(max(options.workers, 1), multiprocessing.get_context("spawn")) as pool:
            for item in pool.map(judge, todo):
                judged.append(item)
                results.extend([_result(item)])
                print(_told(item), flush=True)
    entries = best(judged)
    tune.write_table(options.out, entries)
    out = sum(bool(item.problems) for item in judged)
    print(f"{len(judged)} configs, {out} out; {options.out} has {len(entries)} that stand before the default")
    return results.end(0)
