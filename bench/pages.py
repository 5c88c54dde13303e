"""Measure the memory of keys and values while a request grows to the model's limit.

    python -m bench.pages [--rows 3072] [--every 512] [--prompt 0] [--dtype bfloat16]

One guided request on a narrow model with the attention heads, the layers and the positions of Dia-1.6B, so that every
page has its real size. With `--prompt` that many of its rows are given, which takes seconds instead of minutes; their
pages fill at once. Two columns: the bytes of the pages in use, and by how much the process has grown. The engine's
pool is made for the maximum at the start; on a CPU a page takes memory when it is first written.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.make_checkpoint import DTYPES, random_weight
from bench.metrics import resident
from bench.tools.results import Results, add_options
from dia_fast.engine import Engine, Request
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops

MIB = 1 << 20


def narrow_config() -> DiaConfig:
    """Dia-1.6B with small hidden sizes; what decides the size of a page is unchanged."""
    config = DiaConfig()
    encoder = replace(config.encoder, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    decoder = replace(config.decoder, hidden_size=64, intermediate_size=64, cross_hidden_size=64)
    return DiaConfig(encoder, decoder, config.delay_pattern)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="pages", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=3072, help="length of the request (default: %(default)s)")
    parser.add_argument("--every", type=int, default=512, help="rows between two lines (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=0, help="rows of it that are an audio prompt (default: none)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        results = Results(parser, options, arguments)
    except DiaFastError as error:
        print(f"pages: {error}", file=sys.stderr)
        return 2
    config, dtype = narrow_config(), DTYPES[options.dtype]
    weights = {name: random_weight(config, name, 0, dtype) for name in fused_shapes(config)}
    weights["decoder.head"][config.decoder.eos_token_id] = 0  # it must not end early
    engine = Engine(DiaModel(config, get_ops("torch")).load(weights), max_batch=1)
    prompt = torch.zeros(options.prompt, config.decoder.num_channels, dtype=torch.int64) if options.prompt else None
    engine.submit(Request([1] * 200, prompt, options.rows - options.prompt, seed=0))
    while not engine.stats.steps:
        engine.step()
    start = resident("VmRSS") - engine.stats.page_bytes
    total = engine.stats.total_bytes / MIB
    print(f"one request of {options.rows} rows, {options.dtype}; the pool has room for {total:.0f} MiB\n")
    print("|  row | pages | bytes in pages | process grew by |\n|---:|---:|---:|---:|")
    row = options.prompt + 1
    while engine.step():
        row += 1
        if row == 32 or row % options.every == 0:
            stats = engine.stats
            grown = resident("VmRSS") - start
            print(f"| {row} | {stats.pages} | {stats.page_bytes / MIB:.0f} MiB | {grown / MIB:.0f} MiB |", flush=True)
            results.add({"row": row}, {"pages": stats.pages, "page_bytes": stats.page_bytes, "grown_bytes": grown})
    print(f"\nafterwards {engine.stats.pages} pages are in use; the most were {engine.stats.peak_bytes / MIB:.0f} MiB")
    return results.end(0)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
