"""Measure the work done per second as the number of requests in the batch grows.

    python -m bench.throughput --model FOLDER [--requests 1 2 4 8 16 32] [--against transformers] [--out FOLDER]

Equal requests, all admitted before the first step that counts. Prints a table and, with `--out`, writes it as
`throughput.csv` and draws it (needs matplotlib, extra `bench`). With `--against transformers`, its static batches of up
to `--against-most` requests are timed in turns with ours. Every number of requests gets `--steps` steps: the wall time
is that of the median step.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import plots
from bench.measure import (
    WARM_UP,
    Seconds,
    add_model_options,
    bytes_per_step,
    describe,
    load,
    median,
    now,
    step_times,
    their_run,
)
from bench.tools.results import Results, add_options
from dia_fast.diagnostics.plotting import require_matplotlib
from dia_fast.engine import MAX_BATCH, Engine, Request
from dia_fast.errors import DiaFastError
from dia_fast.generation.inputs import FRAMES_PER_SECOND
from dia_fast.model.config import DiaConfig
from dia_fast.model.model import DiaModel


def equal_requests(config: DiaConfig, count: int, options: argparse.Namespace, steps: int) -> list[Request]:
    """Random texts of one length."""
    texts = torch.randint(1, config.encoder.vocab_size, (count, options.text)).tolist()
    return [Request(ids, None, steps, options.guidance, seed=number) for number, ids in enumerate(texts)]


def our_steps(model: DiaModel, count: int, options: argparse.Namespace) -> list[Seconds]:
    """Return the times of steps with `count` running requests."""
    engine = Engine(model, max_batch=count)
    # Newcomers join one after another; the first is to run until the last has had its steps.
    longest = count + WARM_UP + options.steps + 1
    handles = [engine.submit(request) for request in equal_requests(model.config, count, options, longest)]
    spans: list[Seconds] = []
    while len(spans) < WARM_UP + options.steps:
        ready = engine.stats.running == count
        start = now()
        engine.step()
        if ready:
            spans.append(now().since(start))
    for handle in handles:
        handle.cancel()
    return spans[WARM_UP:]


def measure(model: DiaModel, theirs: Any, options: argparse.Namespace, results: Results) -> list[dict[str, float]]:
    """One row for each number of requests."""
    rows = []
    for count in options.requests:
        ours, others = list[Seconds](), list[Seconds]()
        for _ in range(options.rounds):
            ours += our_steps(model, count, options)
            if theirs is not None and count <= options.against_most:
                requests = equal_requests(model.config, count, options, options.steps + WARM_UP + 1)
                others += step_times(their_run(theirs, model.config, requests))[: options.steps]
        step = median(ours)
        rows.append(
            {
                "requests": count,
                "step_ms": step.wall * 1e3,
                "step_cpu_ms": step.cpu * 1e3,
                "frames_per_second": count / step.wall,
                "realtime": count / step.wall / FRAMES_PER_SECOND,
                "gigabytes_per_second": bytes_per_step(model) / step.wall / 1e9,
            }
        )
        if others:
            rows[-1] |= {"transformers_step_ms": median(others).wall * 1e3, "ratio": median(others).wall / step.wall}
        print("  ".join(f"{rows[-1].get(name, float('nan')):>{len(name)}.2f}" for name in HEADINGS), flush=True)
        results.add({"requests": count}, {name: value for name, value in rows[-1].items() if name != "requests"})
    return rows


HEADINGS = (
    "requests", "step_ms", "step_cpu_ms", "frames_per_second", "realtime", "gigabytes_per_second",
    "transformers_step_ms", "ratio",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="throughput", description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--against-most", type=int, default=8, help="largest static batch of transformers")
    parser.add_argument("--out", type=Path, help="folder for the table and the plot")
    add_options(parser)
    options = parser.parse_args(arguments)
    if not all(1 <= count <= MAX_BATCH for count in options.requests):
        parser.error(f"--requests: from 1 to {MAX_BATCH} fit in a batch, got {options.requests}")
    torch.manual_seed(0)
    try:
        if options.out:
            require_matplotlib()
        model, theirs = load(options)
        results = Results(parser, options, arguments, model.device)
    except DiaFastError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    title = describe(model, options)
    print(title, "  ".join(HEADINGS), sep="\n")
    rows = measure(model, theirs, options, results)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "throughput.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, HEADINGS, restval="")
            writer.writeheader()
            writer.writerows(rows)
        plots.batches(rows, options.out, title.splitlines()[0])
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
