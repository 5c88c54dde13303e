"""Time a decode step beside the original package on the same weights.

    python -m bench.original --model FOLDER [--steps 64] [--rounds 3] [--compile] [--requests 1]

FOLDER holds weights in the original layout (`bench.make_checkpoint --layout original`); the package `dia` has to be
installed. Both sides generate through their public entry points, in one process and in turns, greedily. A step of the
original is the difference of two calls of different length over the difference of their steps: what happens once is
in neither. `--compile` lets it use torch.compile, as its own examples do. Exit status 1 if the original was faster.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.decode_step import step_figures
from bench.measure import (
    WARM_UP,
    Seconds,
    add_model_options,
    bytes_per_step,
    describe,
    least,
    load,
    median,
    now,
    our_run,
    step_times,
    use,
)
from bench.parts import installed
from bench.tools.results import Results, add_options
from dia_fast.engine import Request
from dia_fast.errors import DiaFastError, InputError
from dia_fast.model.device import choose_device
from dia_fast.text.tokenizer import encode_text

TEXT = "[S1] Did you hear that? [S2] Hear what? [S1] It was a bell, far away. [S2] There is no bell here."
SHORT = 16  # steps of the shorter call


def load_original(options: argparse.Namespace) -> Any:
    """Return the original's model, without its codec; the code that ends a sentence never wins. Raises InputError."""
    if not installed("dia"):
        raise InputError("the original package is not installed: pip install git+https://github.com/nari-labs/dia.git")
    from dia.model import Dia

    device = use(choose_device(options.device))
    made = Dia.from_pretrained(options.model, compute_dtype=options.dtype, device=device, load_dac=False)
    made.model.decoder.logits_dense.weight.data[..., made.config.eos_token_id] = 0
    return made


def original_steps(call: Callable[[int], None], steps: int) -> Seconds:
    """Return the mean time of a step. call: generates that many steps."""
    taken = []
    for count in (SHORT, SHORT + steps):
        start = now()
        call(count)
        taken.append(now().since(start))
    span = taken[1].since(taken[0])
    return Seconds(span.wall / steps, span.cpu / steps)


def report(options: argparse.Namespace, results: Results) -> int:
    """Run both in turns and print what a step takes. Raises InputError."""
    theirs = load_original(options)
    model, _ = load(options)
    ids = encode_text(TEXT)
    options.text = len(ids)  # which `describe` prints
    requests = [
        Request(ids, None, options.steps + WARM_UP + 1, options.guidance, temperature=0.0)
        for _ in range(options.requests)
    ]
    texts = [TEXT] * options.requests

    def call(count: int) -> None:
        theirs.generate(
            texts, max_tokens=count, cfg_scale=options.guidance, temperature=0.0, use_torch_compile=options.compile
        )

    call(SHORT)  # compiles, and fills what is filled once
    spans: dict[str, list[Seconds]] = {"dia-fast": [], "original": []}
    for _ in range(options.rounds):
        spans["dia-fast"] += step_times(our_run(model, requests))[: options.steps]
        spans["original"].append(original_steps(call, options.steps))
    how = "torch.compile" if options.compile else "no torch.compile"
    print(f"{describe(model, options)}; {options.requests} requests; original: {how}")
    print(f"{'ms per step':13} {'wall: min':>10} {'median':>8} {'CPU: min':>10} {'median':>8}")
    for name, times in spans.items():
        low, mid = least(times), median(times)
        print(
            f"{name:13} {low.wall * 1e3:10.2f} {mid.wall * 1e3:8.2f} {low.cpu * 1e3:10.2f} {mid.cpu * 1e3:8.2f}"
        )  # fmt: skip
        results.add({"side": name, "requests": options.requests}, step_figures(times, bytes_per_step(model)))
    ratio = median(spans["original"]).wall / median(spans["dia-fast"]).wall
    print(f"steps per second, times the original's: {ratio:.2f} (wall, of the medians)")
    results.add({"side": "ratio", "clock": "wall"}, {"of_the_medians": ratio})
    return results.end(int(ratio < 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if the original was faster."""
    parser = argparse.ArgumentParser(prog="original", description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="let the original use torch.compile")
    add_options(parser)
    options = parser.parse_args(arguments)
    options.against = None
    torch.manual_seed(0)
    try:
        return report(options, Results(parser, options, arguments, choose_device(options.device)))
    except DiaFastError as error:
        print(f"original: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
