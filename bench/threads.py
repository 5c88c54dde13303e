"""From which size of a model on do several threads make a step shorter?

    python -m bench.threads [--threads 2] [--steps 40] [--dtype float32] [--layers 12] [--widths 128 256 ... 2048]

One guided request on models of random weights, in turns with one thread and with `--threads`, on an idle machine and
then with one process on every core that computes without end. A time is that of the median step. `dia-fast speak` takes
one thread where several gain little on an idle machine: they lose much on a busy one.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from bench.make_checkpoint import DTYPES, random_weight
from bench.measure import WARM_UP, describe_machine, median, now
from bench.tools.results import Results, add_options
from dia_fast.engine import Engine, Request
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, parameter_count
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops

WIDTHS = (128, 256, 384, 512, 768, 1024, 1536)


def config_of(width: int, layers: int) -> DiaConfig:
    """Return a decoder in the proportions of Dia-1.6B, behind a small encoder."""
    usual = DiaConfig()
    encoder = replace(usual.encoder, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    heads = max(width // 128, 1)
    decoder = replace(
        usual.decoder,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else 1,
        cross_num_attention_heads=heads,
        cross_num_key_value_heads=heads,
        cross_hidden_size=64,
    )
    return DiaConfig(encoder, decoder, usual.delay_pattern)


def step_seconds(model: DiaModel, threads: int, steps: int) -> float:
    """Wall time of the median step with so many threads."""
    torch.set_num_threads(threads)
    engine = Engine(model, max_batch=1)
    handle = engine.submit(Request([1] * 60, None, WARM_UP + steps + 17, seed=1))
    spans = []
    for _ in range(WARM_UP + steps):
        start = now()
        engine.step()
        spans.append(now().since(start))
    handle.cancel()
    return median(spans[WARM_UP:]).wall


def _spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes that compute without end."""
    others = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="threads", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=cores, help="beside one (default: the cores, %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="that count (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the decoder")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        results = Results(parser, options, arguments)
    except DiaFastError as error:
        print(f"threads: {error}", file=sys.stderr)
        return 2
    print(f"{describe_machine(torch.device('cpu'))}, {options.dtype}, {options.threads} threads beside one\n")
    print(
        "| weights | idle: 1 thread | all | gain | busy: 1 thread | all | gain |\n|---:|---:|---:|---:|---:|---:|---:|"
    )
    for width in options.widths:
        config, dtype = config_of(width, options.layers), DTYPES[options.dtype]
        weights = {name: random_weight(config, name, 0, dtype) for name in fused_shapes(config)}
        weights["decoder.head"][config.decoder.eos_token_id] = 0  # it must not end early
        model = DiaModel(config, get_ops("torch")).load(weights).pack()
        cells = []
        for load in (0, cores):
            with busy(load):
                times = [
                    step_seconds(model, threads, options.steps)
                    for threads in (1, options.threads, options.threads, 1)  # in turns: the machine may change its pace
                ]
            one, several = (times[0] + times[3]) / 2, (times[1] + times[2]) / 2
            cells += [f"{one * 1e3:.2f} ms", f"{several * 1e3:.2f} ms", f"{one / several:.2f}x"]
            results.add(
                {"width": width, "busy": bool(load)},
                {"weights": parameter_count(config), "one_thread_s": one, "threads_s": several},
            )
        print(f"| {parameter_count(config) / 1e6:.0f} M | {' | '.join(cells)} |", flush=True)
    return results.end(0)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
