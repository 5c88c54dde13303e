"""Compile every kernel for every GPU at the shapes of Dia-1.6B, and report on the machine code. No GPU is needed.

    python -m bench.codegen                        # all targets, rows and dtypes; prints the tables
    python -m bench.codegen --targets sm_90 --rows 1 2 --dtypes bfloat16 --markdown tables.md --json report.json
    python -m bench.codegen --brief --json matrix.json    # a result for each target and dtype, and no tables

Each line is one kernel as one launch of the model compiles it; `bench/occupancy.py` adds the room that a launch leaves
for the next one. The exit code is 1 if anything breaks the rules that `violations` and `occupancy.violations` state.
Figures are read off the machine code (`bench/machine_code.py`); none of them is a time.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from tqdm import tqdm

from bench import machine_code, occupancy
from bench.machine_code import MACHINES, Code
from bench.tools.own_ops import add_ops_option, chosen_ops
from bench.tools.results import Results, add_options
from dia_fast.diagnostics import launches
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.quantization import FLOAT, INT8, WEIGHTS
from dia_kernels import aot as ahead
from dia_kernels import triton as kernels

ROWS = (1, 2, 8, 32, 64)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROJECTIONS = ("_rms_norm_linear", "_linear_residual", "_rms_norm_glu", "_codebook_logits")
FIRST_GENERATION = DiaConfig(first_generation=True)
FIRST_KERNELS = ("_cross_attention", "_sample")  # those that its rules change
STREAMS = {"sm_80", "sm_89", "sm_90", "gfx942"}  # where the figures of the streaming goal are asked for
# float32 has no matrix instructions on NVIDIA: 4 multiply-adds per row and load are too many for more rows.
STREAM_ROWS = {"bfloat16": 32, "float16": 32, "float32": 8}
# Weights in 8 bits bring twice the products for a load, and its widening: their figures are asked for up to 8 rows, on
# GPUs that widen two at a time. In fp16, where the norm takes a second pass, a B200 has too few slots for its memory.
INT8_STREAMS = {
    "bfloat16": {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"},
    "float16": {"sm_80", "sm_89", "sm_90", "sm_120"},
    "float32": set(),
}
INT8_STREAM_ROWS = 8
MAX_ISSUE = 0.6
MIN_IN_FLIGHT = {"sm_90": 40 << 10}


@dataclass(frozen=True)
class Line:
    """One compiled launch. rows is 0 for kernels outside the decode step.

    spills: bytes of stack on NVIDIA, registers on AMD; occupancy: resident warps of the most a unit holds;
    weight_bits: width of the narrowest load of weights; matrix: matrix instructions by mnemonic; instructions: size of
    the code; in_flight: most bytes of weights on their way per SM or CU; issue: share of the unit's issue slots needed
    to keep up with full bandwidth. weight_bits is 0 for kernels that stream no weights, the last
    two also where weights cannot be told from activations (gfx1100). weights: of `quantization.WEIGHTS`. loads: loads
    from memory and copies to shared memory by kind. projection: it multiplies by a matrix of weights; the figures of
    weights that cannot be told of it, as behind asynchronous copies, are `n/a` in the tables.
    all_in_flight: a program requests all of its weights before it needs the first.
    """

    target: str
    dtype: str
    rows: int
    kernel: str
    programs: int
    warps: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    weight_bits: int
    matrix: dict[str, int]
    instructions: int
    in_flight: float
    issue: float
    weights: str = FLOAT
    all_in_flight: bool = False
    loads: Mapping[str, int] = field(default_factory=dict)
    projection: bool = False

    @property
    def copies(self) -> list[str]:
        """Kinds of its copies that pass registers by."""
        return [kind for kind in self.loads if kind in machine_code.COPIES]


def read(compiled: ahead.Compiled, target: str) -> Code:
    """Return the machine code of a launch."""
    shared = compiled.result.metadata.shared
    if target.startswith("gfx"):
        return machine_code.read_amd(compiled.asm["amdgcn"], shared)
    return _read_sass(compiled.asm["cubin"], shared)


@functools.lru_cache(maxsize=64)  # a step launches the same code several times, and so do steps of few rows
def _read_sass(cubin: bytes, shared: int) -> Code:
    return machine_code.read_sass(cubin, shared, Path(triton.__file__).parent / "backends" / "nvidia" / "bin")


def line(compiled: ahead.Compiled, target: str, dtype: str, rows: int) -> Line:
    """Return the figures of a launch."""
    code, machine = read(compiled, target), MACHINES[target]
    warps = compiled.result.metadata.num_warps
    programs = 1
    for extent in compiled.grid:
        programs *= extent
    projection = compiled.kernel in PROJECTIONS or getattr(compiled.arguments.get("weight_ptr"), "ndim", 0) == 2
    copied = any(kind in machine_code.COPIES for kind in code.loads())
    loads = code.weight_loads() if projection and not copied else []
    streams = any(load.hint for load in loads)
    return Line(
        target=target,
        dtype=dtype,
        rows=rows,
        kernel=compiled.kernel.removeprefix("_"),
        programs=programs,
        warps=warps,
        registers=code.registers,
        spills=code.spills,
        shared=code.shared,
        occupancy=machine_code.residents(code, machine, warps) * warps / machine.warps,
        weight_bits=min((load.bits for load in loads), default=0),
        matrix=dict(code.matrix()),
        instructions=len(code.instructions),
        in_flight=machine_code.bytes_in_flight(code, machine, warps, programs)[0] if streams else 0.0,
        issue=machine_code.issue_share(code, machine) if streams else 0.0,
        weights=INT8 if projection and compiled.arguments.get("scale_ptr") is not None else FLOAT,
        all_in_flight=streams and machine_code.outstanding_loads(code)[0] == len(loads),
        loads=dict(code.loads()),
        projection=projection,
    )


def is_streaming(item: Line) -> bool:
    """Return True if a kernel must keep up with the memory, for so few rows, in this dtype, on this GPU."""
    if item.weights != FLOAT:
        return 0 < item.rows <= INT8_STREAM_ROWS and item.target in INT8_STREAMS[item.dtype]
    return 0 < item.rows <= STREAM_ROWS[item.dtype] and item.target in STREAMS


def violations(item: Line) -> list[str]:
    """Return the rules that a compiled kernel breaks, a sentence each."""
    where = f"{item.kernel} on {item.target}, {item.dtype}, {item.rows} rows"
    found = []
    if item.spills:
        found.append(f"{where}: spills {item.spills}")
    if item.shared > MACHINES[item.target].shared:
        found.append(f"{where}: {item.shared} bytes of shared memory, the device has {MACHINES[item.target].shared}")
    if f"_{item.kernel}" not in PROJECTIONS and not item.projection:
        return found
    if item.copies:
        # A kernel of one's own may: its figures are n/a, and the rules say nothing of it.
        if f"_{item.kernel}" in PROJECTIONS:
            found.append(f"{where}: loads by {', '.join(item.copies)}, of which bytes in flight cannot be told")
        return found
    # Without hints, the loads of float32 scales cannot be told from those of weights where all products are float32.
    told = item.weights == FLOAT or item.dtype != "float32" or item.in_flight > 0
    if item.weight_bits < 128 and told:
        found.append(f"{where}: a load of weights is {item.weight_bits} bits wide, not 128")
    if not item.matrix and item.dtype != "float32":
        found.append(f"{where}: no matrix instruction")
    if is_streaming(item):
        if item.issue >= MAX_ISSUE:
            found.append(
                f"{where}: needs {item.issue:.0%} of the issue slots at full bandwidth, {MAX_ISSUE:.0%} are allowed"
            )
        goal = MIN_IN_FLIGHT.get(item.target, 0)
        if item.in_flight < goal and not (item.weights != FLOAT and item.all_in_flight):
            found.append(
                f"{where}: {item.in_flight / 1024:.1f} KB of weights in flight per SM, {goal / 1024:.1f} needed"
            )
    return found


def mnemonics_differ(lines: Iterable[Line]) -> list[str]:
    """Projections whose matrix instructions depend on the number of rows: a row's bits would depend on its company."""
    seen: dict[tuple[str, str, str], set[frozenset[str]]] = {}
    for item in lines:
        if f"_{item.kernel}" in PROJECTIONS and item.rows:
            seen.setdefault((item.kernel, item.target, item.dtype), set()).add(frozenset(item.matrix))
    return [
        f"{kernel} on {target}, {dtype}: matrix instructions differ between row counts: {sorted(map(sorted, kinds))}"
        for (kernel, target, dtype), kinds in seen.items()
        if len(kinds) > 1
    ]


def report(
    targets: Sequence[str],
    rows: Sequence[int],
    dtypes: Sequence[str],
    progress: bool = False,
    steps: list[occupancy.Neighbours] | None = None,
    weights: str = FLOAT,
    ops: ModuleType = kernels,
) -> Iterator[Line]:
    """Compile and read every kernel of the chosen combinations; kernels outside the step once per dtype.

    steps: gets the pairs of launches of every step. weights: of the projections; kernels that are the same whatever
    they are, those of prefill and of the first generation, are left out where they are in 8 bits. ops: the op set.
    """
    counts = (*rows, 0) if weights == FLOAT else rows
    jobs = [(target, dtype, count) for target in targets for dtype in dtypes for count in counts]
    for target, dtype, count in tqdm(jobs, desc="compiling", unit="set", disable=not progress):
        with ahead.compiling(target) as compiled:
            if count:
                launches.decode(count, DTYPES[dtype], model=launches.one_layer(DTYPES[dtype], ops, weights=weights))
            else:
                launches.prefill(DTYPES[dtype], ops)
        with ahead.compiling(target) as first:
            if count and weights == FLOAT:
                launches.decode(count, DTYPES[dtype], model=launches.one_layer(DTYPES[dtype], ops, FIRST_GENERATION))
        if count and steps is not None:
            codes = [read(item, target) for item in compiled]
            steps.append(occupancy.neighbours(compiled, codes, target, dtype, count))
        done = set()
        changed = [item for item in first if item.kernel in FIRST_KERNELS]
        for i, item in enumerate((*compiled, *changed)):
            found = line(item, target, dtype, count)
            if i >= len(compiled):
                found = replace(found, kernel=f"{found.kernel} of the first generation")
            key = (found.kernel, found.programs, found.instructions, found.registers)
            if key not in done:
                done.add(key)
                yield found


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    out += ["| " + " | ".join(map(str, cells)) + " |" for cells in rows]
    return "\n".join(out) + "\n"


def markdown(lines: Iterable[Line]) -> str:
    """Return a table per target and dtype. Row counts whose code is alike in all figures share a line."""
    groups: dict[tuple[str, str], dict[tuple[object, ...], list[int]]] = {}
    for item in lines:
        matrix = ", ".join(f"{count} {name}" for name, count in item.matrix.items()) or "-"
        none = "n/a" if item.projection else "-"
        cells = (
            item.kernel, item.programs, item.warps, item.registers, item.spills, item.shared, f"{item.occupancy:.0%}",
            f"{item.weight_bits} bit" if item.weight_bits else none, matrix,
            ", ".join(f"{count} {name}" for name, count in item.loads.items()) or "-", item.instructions,
            f"{item.in_flight / 1024:.0f}" if item.in_flight else none, f"{item.issue:.0%}" if item.issue else none,
        )  # fmt: skip
        kind = item.dtype if item.weights == FLOAT else f"{item.dtype}, weights in 8 bits"
        groups.setdefault((item.target, kind), {}).setdefault(cells, []).append(item.rows)
    head = (
        "rows", "kernel", "programs", "warps", "registers", "spills", "shared B", "occupancy", "weight load",
        "matrix instructions", "loads from memory", "instructions", "KB in flight per SM", "issue slots",
    )  # fmt: skip
    return "\n".join(
        f"## {target}, {dtype}\n\n"
        + table(head, ((", ".join(str(n or "-") for n in rows), *cells) for cells, rows in group.items()))
        for (target, dtype), group in groups.items()
    )


def summary(lines: Iterable[Line]) -> str:
    """Return a table of the worst of every kernel and target; streaming figures where they are judged."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for item in lines:
        groups.setdefault((item.target, item.kernel), []).append(item)

    def cells(target: str, kernel: str, group: list[Line]) -> Iterator[object]:
        yield from (target, kernel, len(group), max(item.registers for item in group))
        yield from (max(item.spills for item in group), max(item.shared for item in group))
        yield f"{min(item.occupancy for item in group):.0%}"
        yield f"{min(item.weight_bits for item in group)} bit" if group[0].weight_bits else "-"
        for wide in (False, True):
            judged = [i for i in group if i.issue and is_streaming(i) and (i.dtype == "float32") == wide]
            yield f"{min(item.in_flight for item in judged) / 1024:.0f}" if judged else "-"
            yield f"{max(item.issue for item in judged):.0%}" if judged else "-"

    head = (
        "target", "kernel", "variants", "registers", "spills", "shared B", "occupancy", "weight load",
        "16 bit: KB in flight", "issue slots", "fp32: KB in flight", "issue slots",
    )  # fmt: skip
    return table(head, ([*cells(*key, group)] for key, group in groups.items()))


def _results(
    lines: Iterable[Line], steps: Iterable[occupancy.Neighbours]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield case and values of every launch, in order, then of every two neighbours of a step."""
    for item in lines:
        values = asdict(item)
        for name in ("matrix", "loads"):
            values[name] = ", ".join(f"{count} {kind}" for kind, count in values[name].items())
        yield {name: values.pop(name) for name in ("target", "dtype", "rows", "kernel")}, values
    for step in steps:
        for pair in step.pairs:
            values = asdict(pair)
            names = {name: values.pop(name) for name in ("first", "second")}
            yield {"target": step.target, "dtype": step.dtype, "rows": step.rows} | names, values


def judged(
    target: str, rows: Sequence[int], dtype: str, weights: str, ops: ModuleType
) -> tuple[list[Line], list[occupancy.Neighbours], list[str]]:
    """Compile for one target and dtype; return launches, pairs of them, and the rules that they break."""
    steps: list[occupancy.Neighbours] = []
    # Room for the next launch is recorded for weights of 16 bits.
    pairs = steps if weights == FLOAT else None
    lines = list(report([target], rows, [dtype], sys.stderr.isatty(), pairs, weights, ops))
    wrong = [problem for item in lines for problem in violations(item)] + mnemonics_differ(lines)
    if ops is kernels:  # what is recorded is recorded of the shipped ones
        wrong += [problem for item in steps for problem in occupancy.violations(item)]
    return lines, steps, wrong


def brief(lines: Sequence[Line], problems: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return case and values of all launches of one target and dtype together. problems: the rules that they break."""
    first = lines[0]
    case = {"triton": triton.__version__, "target": first.target, "dtype": first.dtype}
    values = {
        "kernels": len(lines),
        "spilling": sum(item.spills > 0 for item in lines),
        "registers": max(item.registers for item in lines),
        "shared": max(item.shared for item in lines),
        "violations": len(problems),
    }
    return case | {"weights": max(item.weights for item in lines)}, values


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=(__doc__ or "").splitlines()[0])

    def choice(flag: str, values: Sequence[str]) -> None:
        parser.add_argument(
            flag,
            nargs="+",
            default=values,
            choices=values,
            metavar=flag[2:-1].upper(),
            help="default: all of %(choices)s",
        )

    choice("--targets", ahead.TARGETS)
    choice("--dtypes", tuple(DTYPES))
    parser.add_argument(
        "--rows", nargs="+", type=int, default=ROWS, metavar="N", help="rows of a step, 1 to 64 (default: %(default)s)"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default=FLOAT, help="of the projections (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here instead of printing them")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the worst of each kernel and target here")
    parser.add_argument("--brief", action="store_true", help="a result for each target and dtype, and no tables")
    add_ops_option(parser)
    add_options(parser)
    arguments = parser.parse_args(argv)
    try:
        ops = chosen_ops(arguments.ops)
        results = Results(parser, arguments, argv)
    except DiaFastError as error:
        print(f"codegen: {error}", file=sys.stderr)
        return 2
    lines: list[Line] = []
    steps: list[occupancy.Neighbours] = []
    wrong: list[str] = []
    for target, dtype in itertools.product(arguments.targets, arguments.dtypes):
        found, pairs, problems = judged(target, arguments.rows, dtype, arguments.weights, ops)
        results.extend([brief(found, problems)] if arguments.brief else _results(found, pairs))
        lines, steps, wrong = lines + found, steps + pairs, wrong + problems
    tables = markdown(lines) + "\n" + occupancy.markdown(steps)
    if arguments.markdown:
        arguments.markdown.write_text(tables, encoding="utf-8")
    elif not arguments.brief:
        print(tables)
    if arguments.summary:
        arguments.summary.write_text(summary(lines), encoding="utf-8")
    print(
        *wrong,
        f"{len(lines)} kernels compiled with Triton {triton.__version__}, {len(wrong)} violations",
        sep="\n",
        file=sys.stderr,
    )
    return results.end(1 if wrong else 0)


if __name__ == "__main__":
    sys.exit(main())
