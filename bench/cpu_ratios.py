"""Time a decode step beside transformers bf16 on a CPU, by weights in 16 bits and in 8, and hold it to bars.

    python -m bench.cpu_ratios [--model FOLDER] [--requests 1 2 8 32] [--weights float int8] [--steps 8] [--rounds 3]
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m bench.cpu_ratios

All sides run in one process and in turns, on the same weights: those of --model, or random ones of the size of
Dia-1.6B, which are written to a temporary folder first. A ratio is the least time of a step of transformers over our
least. `BARS` has what each instruction set must reach at that size; the exit status is 1 if a ratio is below its bar.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import make_checkpoint
from bench.decode_step import requests_for
from bench.measure import Seconds, describe_machine, least, our_run, step_times, their_run
from bench.tools.results import Results, add_options
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.errors import DiaFastError
from dia_fast.model.cpu_weights import instruction_set
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import FLOAT, INT8, WEIGHTS, rounded
from dia_kernels import get_ops

_IN_16_BITS = dict.fromkeys((1, 2, 8, 32), 1.0)
_BFLOAT16 = {FLOAT: _IN_16_BITS, INT8: {1: 1.9, 8: 1.8}}
BARS: dict[str, Mapping[str, Mapping[int, float]]] = {
    "amx": _BFLOAT16,
    "avx512_bf16": _BFLOAT16,
    "avx512": _BFLOAT16,
    "avx2": {FLOAT: _IN_16_BITS | {1: 1.7}, INT8: {1: 1.9, 8: 1.8}},
}
"""The least ratio, by instruction set, weights and requests; where there is none, a ratio is shown and not judged."""


def bar(isa: str, weights: str, requests: int) -> float | None:
    """Return the least ratio that is allowed, or None."""
    return BARS.get(isa, {}).get(weights, {}).get(requests)


def load(model: str, kinds: Sequence[str]) -> tuple[dict[str, DiaModel], Any]:
    """Return our models by their weights, packed, and transformers', all of the same weights. Raises DiaFastError."""
    from bench.tools.pairs import theirs_sharing

    checkpoint = open_checkpoint(model)
    fused = checkpoint.load(torch.bfloat16)
    fused["decoder.head"][checkpoint.config.decoder.eos_token_id] = 0  # the code that ends a sentence never wins
    ops = get_ops("torch")
    theirs = theirs_sharing(DiaModel(checkpoint.config, ops).load(fused))
    ours = {kind: DiaModel(checkpoint.config, ops).load(rounded(fused, checkpoint.config, kind)) for kind in kinds}
    return {kind: made.pack(progress=True) for kind, made in ours.items()}, theirs


def measure(
    ours: Mapping[str, DiaModel], theirs: Any, options: argparse.Namespace, requests: int
) -> dict[str, Seconds]:
    """Return the least time of a step by side; transformers is one of them."""
    config = next(iter(ours.values())).config
    asked = requests_for(config, argparse.Namespace(**vars(options) | {"batch": requests}))
    runs = {"transformers": their_run(theirs, config, asked)}
    runs |= {kind: our_run(model, asked) for kind, model in ours.items()}
    spans: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            spans[name] += step_times(run)
    return {name: least(times) for name, times in spans.items()}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="cpu_ratios", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder, file or Hub id (default: random weights of the size of Dia-1.6B)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=[FLOAT, INT8])
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=int, default=200, help="bytes of text")
    parser.add_argument("--clock", choices=Seconds._fields, default="wall", help="the one that decides")
    parser.set_defaults(prompt=0, guidance=3.0)
    add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if a ratio is below its bar."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    isa, low = instruction_set(), []
    with tempfile.TemporaryDirectory(prefix="dia-fast-") as folder:
        model = options.model or str(Path(folder) / "model")
        try:
            results = Results(parser, options, arguments)
            if options.model is None and (status := make_checkpoint.main([model])):
                return status
            ours, theirs = load(model, options.weights)
        except DiaFastError as error:
            print(f"cpu_ratios: {error}", file=sys.stderr)
            return 2
    print(f"{describe_machine(torch.device('cpu'))}, {isa}; torch {torch.__version__}")
    print(f"{'requests':9}{'weights':10}{'ms':>8}{'transformers':>14}{'ratio':>7}{'of CPU':>8}{'bar':>6}")
    for requests in options.requests:
        found = measure(ours, theirs, options, requests)
        other = found.pop("transformers")
        for kind, mine in found.items():
            ratios = {"wall": other.wall / mine.wall, "cpu": other.cpu / mine.cpu}
            least_ratio = bar(isa, kind, requests)
            if least_ratio is not None and ratios[options.clock] < least_ratio:
                low.append(f"{requests} requests, {kind}: {ratios[options.clock]:.2f}, the bar is {least_ratio}")
            results.add(
                {"requests": requests, "weights": kind, "instruction_set": isa},
                {"wall_ms": mine.wall * 1e3, "cpu_ms": mine.cpu * 1e3, "transformers_wall_ms": other.wall * 1e3,
                 "transformers_cpu_ms": other.cpu * 1e3, "wall_ratio": ratios["wall"], "cpu_ratio": ratios["cpu"],
                 "bar": least_ratio},
            )  # fmt: skip
            print(
                f"{requests:<9}{kind:10}{mine.wall * 1e3:8.1f}{other.wall * 1e3:14.1f}{ratios['wall']:7.2f}"
                f"{ratios['cpu']:8.2f}{least_ratio or '-':>6}",
                flush=True,
            )
    print("\n".join(f"below its bar: {said}" for said in low) or "no ratio is below its bar")
    return results.end(1 if low else 0)


if __name__ == "__main__":
    sys.exit(main())
