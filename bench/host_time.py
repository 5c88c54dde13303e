"""Time of the host for one step of the engine, with a model that computes nothing.

    python -m bench.host_time [--requests 1 8 32] [--steps 400] [--rounds 5] [--json FILE]

Requests have been prefilled; each step looks for room, launches, reports and reads the report, as on a device that
answers at once. Pages are taken when they are due. Times are processor time of the thread that makes the steps, which
suffers less from other load than wall time does.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.measure import describe_machine
from bench.tools.results import Results, add_options
from dia_fast.engine import Engine, Request
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_kernels import get_ops


class NoModel:
    """All that an engine asks of a model, and nothing is computed: codes stay what they are, and speech never ends."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.config = DiaConfig()
        self.config = replace(self.config, decoder=replace(self.config.decoder, num_hidden_layers=1))
        self.ops = get_ops("torch")

    def store_text(self, *inputs: Any) -> None:
        """Nothing."""

    def prefill(self, *inputs: Any, **named: Any) -> None:
        """Nothing."""

    def decode_step(self, *inputs: Any) -> None:
        """Nothing."""


def microseconds(count: int, guided: bool, steps: int, rounds: int) -> float:
    """Return the processor time of a step with `count` requests: the mean over `steps`, the least of some rounds."""
    model: Any = NoModel()
    with Engine(model, max_batch=count, memory=1 << 32) as engine:
        for seed in range(count):
            engine.submit(Request([5] * 20, None, guidance_scale=3.0 if guided else None, seed=seed))
        while engine.stats.running < count:
            engine.step()
        found = []
        for _ in range(rounds):
            start = time.thread_time()
            for _ in range(steps):
                engine.step()
            found.append((time.thread_time() - start) / steps * 1e6)
        if engine.stats.running != count:
            raise AssertionError(f"{engine.stats.running} requests of {count} are left")
        return min(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="host_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=400, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    add_options(parser)
    options = parser.parse_args(arguments)
    if not 0 < options.steps * options.rounds < 3000:
        parser.error("--steps times --rounds must be from 1 to 2999: the requests have 3072 positions")
    try:
        results = Results(parser, options, arguments)
    except DiaFastError as error:
        print(f"host_time: {error}", file=sys.stderr)
        return 2
    print(f"{describe_machine(torch.device('cpu'))}; torch {torch.__version__}\n")
    print("| requests | guided | not guided |\n|---:|---:|---:|", flush=True)
    for count in options.requests:
        found = [microseconds(count, guided, options.steps, options.rounds) for guided in (True, False)]
        results.add({"requests": count}, {"guided_us": found[0], "unguided_us": found[1]})
        print(f"| {count} | {found[0]:.0f} us | {found[1]:.0f} us |", flush=True)
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
