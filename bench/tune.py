"""Which configuration of each kernel makes a decode step fastest on this GPU? Writes a table for DIA_KERNELS_TABLE.

    python -m bench.tune --out table.json [--rows 2 16 64] [--dtype bfloat16] [--budget 300] [--json all.json]
    DIA_KERNELS_TABLE=table.json dia-fast speak ...

Times the whole step, as a CUDA graph, with one launch of it configured otherwise: what a kernel hides behind its
neighbours counts, what it takes alone does not. Launches are tuned one after another, each on what was best for those
before it. Worker processes compile ahead. Only BLOCK_N, BLOCK_R and DEPTH may differ between numbers of rows, or a
row's bits would depend on its company: --bits lets the rest be tried too, for all numbers of rows alike.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.captured import CapturedStep, Load, QuickCapture, random_model, state_for
from bench.device import open_device
from bench.measure import DTYPES
from dia_fast.errors import DiaFastError
from dia_fast.files import replacing

Config = dict[str, int]

PROJECTIONS = {
    "qkv": ("rms_norm_linear", {"features": 3072}),
    "cross_q": ("rms_norm_linear", {"features": 2048}),
    "o": ("linear_residual", {"hidden": 2048}),
    "gate_up": ("rms_norm_glu", {}),
    "down": ("linear_residual", {"hidden": 8192}),
    "heads": ("codebook_logits", {}),
}


@dataclass(frozen=True)
class Launch:
    """What is tuned: an op where its shape is `where`."""

    name: str
    op: str
    where: tuple[tuple[str, Any], ...]

    def entry(self, use: Config) -> dict[str, Any]:
        """Of a table."""
        return {"where": dict(self.where), "use": use}


def launches(rows: int, dtype: str, only: Sequence[str] | None) -> list[Launch]:
    """Those of a step."""
    found = [Launch(op, op, (("dtype", dtype),)) for op in ("rope_attention", "cross_attention", "embed_codes")]
    found.append(Launch("sample", "sample", ()))
    for name in ("gate_up", "down", "qkv", "o", "cross_q", "heads"):
        op, shape = PROJECTIONS[name]
        # The cross projections see conditional rows only.
        seen = [rows] if name not in ("cross_q", "o") else sorted({rows, max(rows // 2, 1)})
        for count in seen if name != "cross_q" else [max(rows // 2, 1)]:
            label = name if count == rows or name == "cross_q" else f"cross_{name}"
            found.append(Launch(label, op, tuple({"rows": count, "dtype": dtype, **shape}.items())))
    return [launch for launch in found if not only or launch.name in only]


def candidates(launch: Launch, bits: bool) -> Iterator[Config]:
    """What is tried beside the default; what would hold too few bytes in flight, or too many for registers, is not."""
    if launch.op == "rope_attention":
        yield from ({"SPLIT": split, "num_warps": warps} for split in (64, 128) for warps in (4, 8))
        return
    if launch.op == "cross_attention":
        yield from ({"SPLIT": split, "num_warps": warps} for split in (64, 128) for warps in (2, 4, 8))
        return
    if launch.op == "embed_codes":
        yield from ({"num_warps": warps, "BLOCK_H": block} for warps in (4, 8, 16) for block in (1024, 2048))
        return
    if launch.op == "sample":
        yield from ({"DIGIT": digit, "num_warps": warps} for digit in (1, 2, 4) for warps in (2, 4, 8))
        return
    # SPLIT_K and CHUNKS; the default's are 8 and 2.
    splits = ((8, 1), (8, 2), (8, 4), (4, 1), (4, 2), (4, 4), (2, 2), (2, 4)) if bits else ((8, 2),)
    for (split, chunks), block_n, depth in itertools.product(splits, (8, 16, 32, 64), (1, 2, 4, 8)):
        if 32 <= block_n * chunks * depth <= 160:
            order = {"SPLIT_K": split, "num_warps": split, "CHUNKS": chunks} if bits else {}
            yield {"BLOCK_N": block_n, "DEPTH": depth, **order}


def write_table(path: Path, chosen: Iterable[tuple[Launch, Config]]) -> Path:
    """A table for DIA_KERNELS_TABLE."""
    table: dict[str, list[dict[str, Any]]] = {}
    for launch, use in chosen:
        table.setdefault(launch.op, []).append(launch.entry(use))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return path


def compile_ahead(job: tuple[str, str, int, str, str]) -> str:
    """Compiles one op of a step under a table, into Triton's cache on disk; returns what went wrong."""
    table, arch, rows, dtype, op = job
    os.environ["DIA_KERNELS_TABLE"] = table
    from dia_fast import launches as steps
    from dia_kernels import ahead, kernels

    ops = SimpleNamespace(**{name: lambda *args, **named: None for name in kernels.__all__}, name="triton")
    ops.attention_workspace = kernels.attention_workspace
    setattr(ops, op, getattr(kernels, op))
    try:
        with ahead.compiling(arch):
            steps.decode(rows, DTYPES[dtype], ops)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return ""


class Tuner:
    """Tunes the launches of a step for one number of rows after another."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from dia_kernels import get_ops
        from dia_kernels.launch import architecture

        self.options, self.folder, self.numbers = options, folder, itertools.count()
        self.device = open_device(options.device)
        self.arch = architecture(self.device.torch)
        self.model = random_model(
            DTYPES[options.dtype], self.device.torch, get_ops("triton", self.device.torch), options.layers
        )
        self.chosen: list[tuple[Launch, Config]] = []
        self.trials: list[dict[str, Any]] = []
        self.deadline = time.monotonic() + options.budget

    def table(self, *more: tuple[Launch, Config]) -> str:
        return str(write_table(self.folder / f"{next(self.numbers)}.json", [*more, *self.chosen]))

    def compile(self, pool: ProcessPoolExecutor) -> None:
        """Everything that will be tried."""
        jobs = []
        for rows in self.options.rows:
            for launch in launches(rows, self.options.dtype, self.options.only):
                for use in candidates(launch, self.options.bits):
                    jobs.append((self.table((launch, use)), self.arch, rows, self.options.dtype, launch.op))
        start = time.monotonic()
        failed = [said for said in pool.map(compile_ahead, jobs) if said]
        print(f"{len(jobs)} configurations compiled in {time.monotonic() - start:.0f} s, {len(failed)} failed")
        for said in sorted(set(failed)):
            print(f"  {said}")

    def run(self) -> None:
        """Raises DiaFastError, and whatever a step raises with the default configurations."""
        capture = QuickCapture() if self.device.gpu else None
        for rows in self.options.rows:
            load = Load(rows, self.options.context, self.options.text)
            state = state_for(self.model, load)

            def seconds(table: str, state: Any = state, load: Load = load) -> float:
                os.environ["DIA_KERNELS_TABLE"] = table
                return CapturedStep(self.device, self.model, state, load, capture).seconds()

            best = first = seconds(self.table())
            print(f"{rows} rows: {first * 1e3:.4f} ms a step by default", flush=True)
            for launch in launches(rows, self.options.dtype, self.options.only):
                found = None
                for use in candidates(launch, self.options.bits):
                    if time.monotonic() > self.deadline:
                        print("the time is over")
                        return
                    try:
                        taken = seconds(self.table((launch, use)))
                    except Exception as error:
                        said = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
                        self.trials.append({"rows": rows, "launch": launch.name, "use": use, "failed": said})
                        torch.cuda.synchronize()
                        continue
                    self.trials.append({"rows": rows, "launch": launch.name, "use": use, "seconds": taken})
                    if taken < best * (1 - self.options.margin):
                        best, found = taken, use
                if found:
                    self.chosen.insert(0, (launch, found))
                    print(f"  {launch.name:16} {found} {best * 1e3:.4f} ms", flush=True)
            again = seconds(self.table())
            print(f"{rows} rows: {again * 1e3:.4f} ms a step as tuned, {first / again:.3f} times faster", flush=True)
            self.trials.append({"rows": rows, "launch": "all", "default": first, "tuned": again})
            del state
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="file for the table")
    parser.add_argument("--json", type=Path, help="file for all that was tried")
    parser.add_argument("--rows", type=int, nargs="+", default=[2], help="of the step: 1, or twice the requests")
    parser.add_argument("--only", nargs="+", help=f"launches: {', '.join(PROJECTIONS)}, rope_attention, sample, ...")
    parser.add_argument("--bits", action="store_true", help="try what decides a row's bits, too")
    parser.add_argument("--context", type=int, default=860)
    parser.add_argument("--text", type=int, default=200, help="bytes")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layers", type=int, help="of the decoder (default: all)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--margin", type=float, default=0.001, help="what a gain must exceed to count (%(default)s)")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of trying (%(default)s)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile; 0 leaves it to the trials")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache and end")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dia-fast-") as folder:
        try:
            tuner = Tuner(options, Path(folder))
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
            if options.json:
                options.json.write_text(json.dumps(tuner.trials, indent=1) + "\n", encoding="utf-8")
            write_table(options.out, tuner.chosen)
    print(f"table: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
