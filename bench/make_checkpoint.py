"""Make a checkpoint of random weights at the full size of Dia-1.6B, for benchmarks: only the sizes matter for time.

    python -m bench.make_checkpoint FOLDER [--dtype bfloat16] [--layout transformers] [--layers 12 18] [--seed 0]

The weights are drawn and written one at a time: memory stays below a gigabyte. They are scaled so that activations stay
of order one through all layers; the speech is noise.
"""

import argparse
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dia_fast.checkpoint.saving import write_checkpoint
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, parameter_count

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def random_weight(config: DiaConfig, name: str, seed: int, dtype: torch.dtype) -> Tensor:
    """One packed weight, determined by its name and the seed: norms near 1, projections that keep the variance."""
    shape = fused_shapes(config)[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    weight = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        weight.mul_(0.1).add_(1)
    elif not name.endswith("embedding"):
        weight.mul_(shape[1] ** -0.5)
        # Scores are not scaled by 1 / sqrt(head_dim); queries and keys of this size keep the softmax from saturating.
        stack = config.encoder if name.startswith("encoder") else config.decoder
        if name.endswith("qkv"):
            weight[: -stack.num_key_value_heads * stack.head_dim].mul_(stack.head_dim**-0.25)
        elif name.endswith("cross_q"):
            weight.mul_(config.decoder.cross_head_dim**-0.25)
        elif name.endswith("cross_kv"):
            weight[: shape[0] // 2].mul_(config.decoder.cross_head_dim**-0.25)
    return weight.to(dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make_checkpoint", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layout", choices=("transformers", "original"), default="transformers")
    parser.add_argument("--layers", type=int, nargs=2, metavar=("ENCODER", "DECODER"), default=(12, 18))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype]
    start = time.perf_counter()
    try:
        config = DiaConfig()
        config = replace(
            config,
            encoder=replace(config.encoder, num_hidden_layers=options.layers[0]),
            decoder=replace(config.decoder, num_hidden_layers=options.layers[1]),
        )
        folder = write_checkpoint(
            options.folder,
            config,
            dict.fromkeys(fused_shapes(config), dtype),
            lambda name: random_weight(config, name, options.seed, dtype),
            layout=options.layout,
            max_shard_bytes=2_000_000_000 if options.layout == "transformers" else None,
        )
    except DiaFastError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{folder}: {parameter_count(config):,} random weights, {options.dtype}, {options.layout} layout, "
        f"{size / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
