"""Find the configs that make a decode step fastest on this GPU, and write them as a DIA_KERNELS_TABLE.

    python -m bench.tune --out table.json [--rows 2 16 64] [--dtype bfloat16] [--weights int8] [--json all.json]
    DIA_KERNELS_TABLE=table.json dia-fast speak ...
    python -m bench.tune --target sm_90 --out candidates.json --only qkv --json judged.json     # no GPU is needed
    python -m bench.tune --config FOLDER/config.json ...    # for a model of other sizes than Dia-1.6B

Times the whole step, as a CUDA graph, with one launch of it configured otherwise: what a kernel hides behind its
neighbours counts, what it takes alone does not. Launches are tuned one after another, each on what was best for those
before it. Worker processes compile ahead. SPLIT_K and CHUNKS order the sum of a projection; what is best for the first
number of rows holds for all others, those that are not tuned included, or a row's bits would depend on its company.
What does not depend on the number of rows is tuned for the first one only.

With `--target` nothing is timed: the candidates are compiled for that GPU and judged by their machine code
(`bench/offline.py`). That tells which are worth a try, not which is fastest.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.captured import CapturedStep, Load, QuickCapture, random_model, state_for
from bench.device import open_device
from bench.measure import DTYPES
from bench.tools.own_ops import add_ops_option, chosen_ops
from bench.tools.results import Results, add_options
from dia_fast.diagnostics.roofline import work
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.quantization import FLOAT, WEIGHTS
from dia_fast.utils.files import replacing
from dia_kernels import aot
from dia_kernels.launcher import architecture
from dia_kernels.triton import gemv

Config = dict[str, int]

PROJECTIONS = {
    "gate_up": "rms_norm_glu",
    "down": "linear_residual",
    "qkv": "rms_norm_linear",
    "o": "linear_residual",
    "cross_o": "linear_residual",
    "cross_q": "rms_norm_linear",
    "heads": "codebook_logits",
}
"""The op of each projection of a step, the ones with the most bytes first."""
Family = tuple[str, tuple[tuple[str, Any], ...]]  # an op and its shape, without rows: whose rows come out alike


@dataclass(frozen=True)
class Launch:
    """A launch to tune: an op where its shape is `where`."""

    name: str
    op: str
    where: tuple[tuple[str, Any], ...]

    @property
    def kind(self) -> str:
        """Constants to tune: "ahead", or everything else."""
        return self.name.partition(" ")[2]

    @property
    def in_8_bits(self) -> bool:
        """By weights in 8 bits?"""
        return ("weight_bits", 8) in self.where

    @property
    def family(self) -> Family:
        """The launches of its op and shape, with any number of rows."""
        return self.op, tuple(item for item in self.where if item[0] != "rows")

    def entry(self, use: Config) -> dict[str, Any]:
        """Of a table."""
        return {"where": dict(self.where), "use": use}


def shapes(config: DiaConfig) -> dict[str, dict[str, int]]:
    """Return what a table may name of each projection: the `features` and `hidden` columns of its weights."""
    fused = fused_shapes(config)
    found = {}
    for name in PROJECTIONS:
        features, hidden = fused["decoder.head" if name == "heads" else f"decoder.layers.0.{name}"]
        found[name] = {"features": features, "hidden": hidden}
    return found


def launches(
    rows: int, dtype: str, only: Sequence[str] | None, weights: str = FLOAT, config: DiaConfig | None = None
) -> list[Launch]:
    """Those of a step. weights: of `quantization.WEIGHTS`; config: of the model, by default Dia-1.6B's."""
    attention = ("rope_attention", "cross_attention")
    found = [Launch(op, op, (("dtype", dtype),)) for op in (*attention, "embed_codes")]
    found.append(Launch("sample", "sample", ()))
    projections: dict[tuple[tuple[str, Any], ...], Launch] = {}
    for name, shape in shapes(config or DiaConfig()).items():
        bits = 8 if name in work.IN_8_BITS[weights] else 8 * DTYPES[dtype].itemsize
        count = max(rows // 2, 1) if name.startswith("cross_") else rows  # cross-attention has conditional rows only
        where = tuple({"rows": count, "dtype": dtype, "weight_bits": bits, **shape}.items())
        projections.setdefault((("op", PROJECTIONS[name]), *where), Launch(name, PROJECTIONS[name], where))
    found += projections.values()
    found += [Launch(f"{launch.name} ahead", launch.op, launch.where) for launch in projections.values()]
    return [launch for launch in found if not only or launch.name in only]


ORDERS = ((4, 2), (4, 4), (8, 1), (8, 2), (2, 4))  # SPLIT_K and CHUNKS, which decide a row's bits
INT8_ORDERS = ((4, 2), (4, 1), (8, 1), (8, 2), (2, 4))  # a chunk has twice the columns


def candidates(launch: Launch, orders: Sequence[tuple[int, int]]) -> Iterator[Config]:
    """Yield configs to try beside the default; not those with too few bytes in flight, or too many for registers."""
    if launch.kind == "ahead":
        yield from ({"X_AHEAD": steps} for steps in (1, 2, 4))
        return
    if launch.op in ("rope_attention", "cross_attention"):
        for split, warps, chunk in itertools.product((64, 128, 256), (4, 8, 16), (8, 16)):
            if split <= 32 * warps and (launch.op == "rope_attention" or chunk == 8):
                yield {"SPLIT": split, "num_warps": warps, "CHUNK": chunk}
        return
    if launch.op == "embed_codes":
        yield from ({"num_warps": warps} for warps in (4, 8, 16))
        return
    if launch.op == "sample":
        yield from ({"DIGIT": digit, "num_warps": warps} for digit in (1, 2, 4) for warps in (1, 2, 4, 8))
        return
    # The instruction takes 16 features of weights in 8 bits at a time.
    blocks = (16, 32, 64) if launch.in_8_bits else (8, 16, 32)
    for (split, chunks), block_n, depth in itertools.product(orders, blocks, (1, 2, 4, 8)):
        if 32 <= block_n * chunks * depth <= 128:
            order = {"SPLIT_K": split, "num_warps": split, "CHUNKS": chunks}
            yield {"BLOCK_N": block_n, "DEPTH": depth, **order}


def write_table(path: Path, chosen: Iterable[tuple[Launch, Config]]) -> Path:
    """Write a table for DIA_KERNELS_TABLE."""
    table: dict[str, list[dict[str, Any]]] = {}
    for launch, use in chosen:
        table.setdefault(launch.op, []).append(launch.entry(use))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return path


def only_op(op: str, own: str | None) -> SimpleNamespace:
    """Return an op set in which the others do nothing. own: the place that `--ops` names."""
    kernels = chosen_ops(own)
    ops = SimpleNamespace(**{name: lambda *args, **named: None for name in kernels.__all__}, name="triton")
    ops.attention_workspace = kernels.attention_workspace
    setattr(ops, op, getattr(kernels, op))
    return ops


def told(error: Exception) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def model_config(options: argparse.Namespace) -> DiaConfig:
    """Return the configuration that `--config` names, or Dia-1.6B's. Raises CheckpointError."""
    return DiaConfig.from_file(options.config) if options.config else DiaConfig()


def compile_ahead(job: tuple[str, int, str, str, str, str | None, DiaConfig]) -> str:
    """Compile one op of a step under a table for the GPU at hand, into Triton's cache on disk; return what failed."""
    table, rows, dtype, op, weights, own, config = job
    os.environ["DIA_KERNELS_TABLE"] = table
    from dia_fast.diagnostics import launches as steps
    from dia_kernels import launcher as launch

    try:
        with launch.listening(lambda run, kernel, grid, args, meta: kernel.warmup(*args, grid=grid, **meta)):
            model = steps.one_layer(DTYPES[dtype], only_op(op, own), config, weights)
            steps.decode(rows, DTYPES[dtype], model=model)
    except Exception as error:
        return told(error)
    return ""


class Tuner:
    """Tunes the launches of a step for one number of rows after another."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from dia_kernels import get_ops, with_ops

        self.options, self.folder, self.numbers = options, folder, itertools.count()
        self.config = model_config(options)
        self.device = open_device(options.device)
        ops = get_ops("triton", self.device.torch)
        if options.ops:
            ops = with_ops(ops, options.ops)
        self.arch = architecture(self.device.torch)
        self.model = random_model(
            DTYPES[options.dtype], self.device.torch, ops, options.layers, options.weights, self.config
        )
        self.chosen: list[tuple[Launch, Config]] = []
        self.decided: dict[Family, tuple[int, int]] = {}  # SPLIT_K and CHUNKS
        self.trials: list[dict[str, Any]] = []
        self.deadline = float("inf")

    def launches(self, rows: int) -> list[Launch]:
        """Those of a step of so many rows that are tuned."""
        return launches(rows, self.options.dtype, self.options.only, self.options.weights, self.config)

    def entries(self) -> list[tuple[Launch, Config]]:
        """Return the chosen configs, and behind them the order of each family's sums for all other numbers of rows."""
        orders = [
            (Launch(op, op, shape), {"SPLIT_K": split, "num_warps": split, "CHUNKS": chunks})
            for (op, shape), (split, chunks) in self.decided.items()
        ]
        return [*self.chosen, *orders]

    def table(self, *more: tuple[Launch, Config]) -> str:
        return str(write_table(self.folder / f"{next(self.numbers)}.json", [*more, *self.entries()]))

    def orders(self, launch: Launch) -> Sequence[tuple[int, int]]:
        """Return the orders to try: one that was decided for this op and shape, with other rows, holds for all."""
        if launch.family in self.decided:
            return [self.decided[launch.family]]
        return INT8_ORDERS if launch.in_8_bits else ORDERS

    def decide(self, launch: Launch, found: Config | None) -> None:
        """Keep the order of a projection's sums: that of the configuration found, or of the default."""
        if launch.kind == "" and launch.op in gemv.OPS:
            where = dict(launch.where)
            shape = {name: where[name] for name in ("rows", "features", "hidden", "weight_bits")}
            use = found or gemv.default_config(launch.op, DTYPES[where["dtype"]], self.arch, **shape)
            self.decided.setdefault(launch.family, (use["SPLIT_K"], use["CHUNKS"]))

    def compile(self, pool: ProcessPoolExecutor) -> None:
        """Compile the configs to be tried, as far as they are known before any is chosen; others compile when tried."""
        jobs = []
        for rows in self.options.rows:
            for launch in self.launches(rows):
                for use in candidates(launch, self.orders(launch)):
                    use_of = self.table((launch, use)), rows, self.options.dtype, launch.op
                    jobs.append((*use_of, self.options.weights, self.options.ops, self.config))
        start = time.monotonic()
        failed = [said for said in pool.map(compile_ahead, jobs) if said]
        print(f"{len(jobs)} configurations compiled in {time.monotonic() - start:.0f} s, {len(failed)} failed")
        for said in sorted(set(failed)):
            print(f"  {said}")

    def run(self) -> None:
        """Tune every launch. Raises DiaFastError, and all that a step raises with the default configs."""
        capture = QuickCapture() if self.device.gpu else None
        self.deadline = time.monotonic() + self.options.budget
        done: set[tuple[str, str, Any]] = set()
        for rows in self.options.rows:
            load = Load(rows, self.options.context, self.options.text)
            state = state_for(self.model, load)

            def seconds(table: str, state: Any = state, load: Load = load) -> float:
                os.environ["DIA_KERNELS_TABLE"] = table
                return CapturedStep(self.device, self.model, state, load, capture).seconds()

            best = first = seconds(self.table())
            print(f"{rows} rows: {first * 1e3:.4f} ms a step before they are tuned", flush=True)
            for launch in self.launches(rows):
                if (launch.kind, launch.op, launch.where) in done:
                    continue  # alike for all numbers of rows, or met before by another name
                done.add((launch.kind, launch.op, launch.where))
                found, best = self._best(launch, rows, best, seconds)
                self.decide(launch, found)
                if found:
                    self.chosen.insert(0, (launch, found))
                    print(f"  {launch.name:20} {found} {best * 1e3:.4f} ms", flush=True)
                if time.monotonic() > self.deadline:
                    print("the time is over")
                    return
            again = seconds(self.table())
            print(f"{rows} rows: {again * 1e3:.4f} ms a step as tuned, {first / again:.3f} times faster", flush=True)
            self.trials.append({"rows": rows, "launch": "all", "default": first, "tuned": again})
            del state
            torch.cuda.empty_cache()

    def _best(
        self, launch: Launch, rows: int, best: float, seconds: Callable[[str], float]
    ) -> tuple[Config | None, float]:
        """Return the fastest config of a launch, None if none is faster than the present, and the step's seconds."""
        found = None
        so_far: Config = next((use for other, use in self.entries() if other.op == launch.op
                               and set(other.where) <= set(launch.where)), {})  # fmt: skip
        for change in candidates(launch, self.orders(launch)):
            if time.monotonic() > self.deadline:
                break
            use = so_far | change
            trial: dict[str, Any] = {"rows": rows, "launch": launch.name, "use": use}
            self.trials.append(trial)
            try:
                trial["seconds"] = taken = seconds(self.table((launch, use)))
            except Exception as error:
                trial["failed"] = told(error)
                if self.device.gpu:
                    torch.cuda.synchronize()
                continue
            if taken < best * (1 - self.options.margin):
                best, found = taken, use
        return found, best


def _result(trial: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return case and values of a trial."""
    case = {"rows": trial["rows"], "launch": trial["launch"], "use": json.dumps(trial.get("use"))}
    return case, {name: value for name, value in trial.items() if name not in case}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="file for the table")
    parser.add_argument("--config", type=Path, help="config.json of the model to tune for (default: Dia-1.6B's)")
    add_ops_option(parser)
    add_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[2], help="of the step: 1, or twice the requests")
    parser.add_argument(
        "--only", nargs="+", help=f"launches: {', '.join(PROJECTIONS)}, 'qkv ahead', rope_attention, sample, ..."
    )
    parser.add_argument("--context", type=int, default=860)
    parser.add_argument("--text", type=int, default=200, help="bytes")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--weights", choices=WEIGHTS, default=FLOAT, help="of the model (%(default)s)")
    parser.add_argument("--layers", type=int, help="of the decoder (default: all)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--margin", type=float, default=0.001, help="what a gain must exceed to count (%(default)s)")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of trying (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile; 0 leaves it to the trials"
    )
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache and end")
    parser.add_argument("--target", choices=aot.TARGETS, help="judge candidates by their machine code for that GPU")
    options = parser.parse_args(arguments)
    known = [one.name for one in launches(64, options.dtype, None)]
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--only: no launch {unknown[0]!r}; there are {', '.join(known)}")
    if options.target:
        from bench import offline

        return offline.run(parser, options, arguments)
    with tempfile.TemporaryDirectory(prefix="dia-fast-") as folder:
        try:
            tuner = Tuner(options, Path(folder))
            results = Results(parser, options, arguments, tuner.device.torch)
        except (DiaFastError, ValueError) as error:
            print(f"tune: {error}", file=sys.stderr)
            return 2
        if options.workers:
            with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
                tuner.compile(pool)
        if options.compile_only:
            return 0
        try:
            with torch.inference_mode():
                tuner.run()
        finally:
            results.extend(map(_result, tuner.trials))
            write_table(options.out, tuner.entries())
    print(f"table: {options.out}")
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
