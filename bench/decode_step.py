"""Time one decode step, beside transformers on the same weights.

    python -m bench.decode_step --model FOLDER [--against transformers] [--batch 8] [--steps 16] [--rounds 3]

Both sides generate through their public entry points, greedily, in one process and in turns. The time of a step is the
time between two calls that each side makes anyway (a progress callback, a stopping criterion): everything that a step
costs the user is in it. transformers gets views of the weights as they were loaded; ours are packed where that helps.
The exit status is 1 if transformers was faster by the clock of `--clock`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.measure import (
    WARM_UP,
    Seconds,
    add_model_options,
    bytes_per_step,
    describe,
    least,
    load,
    median,
    our_run,
    step_times,
    their_run,
)
from bench.tools.results import Results, add_options
from dia_fast.engine import Request
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.model import DiaModel


def requests_for(config: DiaConfig, options: argparse.Namespace) -> list[Request]:
    """Random texts of one length, so that transformers need not pad; the same prompt length for all."""
    texts = torch.randint(1, config.encoder.vocab_size, (options.batch, options.text)).tolist()
    decoder = config.decoder
    prompt = torch.randint(0, decoder.eos_token_id, (options.prompt, decoder.num_channels)) if options.prompt else None
    new = options.steps + WARM_UP + 1
    return [Request(ids, prompt, new, options.guidance, temperature=0.0) for ids in texts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if transformers was faster."""
    parser = argparse.ArgumentParser(prog="decode_step", description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=1, help="requests")
    parser.add_argument("--prompt", type=int, default=0, help="frames of audio prompt")
    parser.add_argument("--steps", type=int, default=16, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=Seconds._fields, default="wall", help="the one that decides")
    add_options(parser)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        model, theirs = load(options)
        results = Results(parser, options, arguments, model.device)
    except DiaFastError as error:
        print(f"decode_step: {error}", file=sys.stderr)
        return 2
    return results.end(report(model, theirs, options, results))


def step_figures(times: Sequence[Seconds], moved: int) -> dict[str, float]:
    """Return the least and the median of step times. moved: bytes of weights that a step reads."""
    low, mid = least(times), median(times)
    return {
        "wall_min_ms": low.wall * 1e3, "wall_median_ms": mid.wall * 1e3, "cpu_min_ms": low.cpu * 1e3,
        "cpu_median_ms": mid.cpu * 1e3, "weights_gigabytes_per_second": moved / low.wall / 1e9, "steps": len(times),
    }  # fmt: skip


def report(model: DiaModel, theirs: Any, options: argparse.Namespace, results: Results) -> int:
    """Run both sides in turns and print what a step takes: the least, which disturbs little, and the median."""
    requests = requests_for(model.config, options)
    sides = {"dia-fast": our_run(model, requests)}
    if theirs is not None:
        sides["transformers"] = their_run(theirs, model.config, requests)
    spans: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, run in sides.items():
            spans[name] += step_times(run)[: options.steps]
    moved = bytes_per_step(model)
    print(f"{describe(model, options)}; batch {options.batch}, {options.prompt} frames of prompt")
    print(f"{'ms per step':13} {'wall: min':>10} {'median':>8} {'CPU: min':>10} {'median':>8} {'GB/s':>6} {'steps':>6}")
    for name, times in spans.items():
        low, mid = least(times), median(times)
        print(
            f"{name:13} {low.wall * 1e3:10.1f} {mid.wall * 1e3:8.1f} {low.cpu * 1e3:10.1f} {mid.cpu * 1e3:8.1f} "
            f"{moved / low.wall / 1e9:6.2f} {len(times):6}"
        )
        results.add({"side": name, "requests": options.batch}, step_figures(times, moved))
    if len(spans) == 1:
        return 0
    ours, others = spans.values()
    pairs = [(pick(others), pick(ours)) for pick in (least, median)]
    ratios = {clock: [getattr(a, clock) / getattr(b, clock) for a, b in pairs] for clock in Seconds._fields}
    print("steps per second, times transformers': " + "; ".join(
        f"{clock} {low:.2f} (of the least), {mid:.2f} (of the medians)" for clock, (low, mid) in ratios.items()
    ))  # fmt: skip
    results.extend(
        ({"side": "ratio", "clock": clock}, {"of_the_least": low, "of_the_medians": mid})
        for clock, (low, mid) in ratios.items()
    )
    return int(ratios[options.clock][1] < 1)


if __name__ == "__main__":
    sys.exit(main())
