"""Compiles every kernel of training for a GPU that is not there, at the shapes of Dia-1.6B: one JSON line each.

    python -m tests.kernels.compile_gradients sm_90,gfx942 bfloat16,float32

A process of its own, because Triton compiles nothing where it interprets.
"""

import dataclasses
import json
import sys
from typing import Any

import torch

from bench.codegen import line, violations
from dia_kernels import aot as ahead
from dia_kernels.autograd import gradients

ROWS, HIDDEN, INTERMEDIATE, CHANNELS, VOCAB = 1024, 2048, 8192, 9, 1028


def launches(dtype: torch.dtype) -> None:
    """Every gradient op of the decoder, once, on the meta device; weights are float32, as in training."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = torch.float32
    x, norm = tensor(ROWS, HIDDEN), tensor(HIDDEN, dtype=wide)
    gradients.rms_norm(x, norm, 1e-5, x)
    gradients.rms_norm_backward(x, norm, 1e-5, x, x, norm)
    gradients.rms_norm_backward(x, norm, 1e-5, x, x)
    gradients.glu(tensor(ROWS, 2 * INTERMEDIATE), tensor(ROWS, INTERMEDIATE))
    both = tensor(ROWS, 2 * INTERMEDIATE)
    gradients.glu_backward(both, tensor(ROWS, INTERMEDIATE), both)
    qkv, table = tensor(ROWS, (16 + 2 * 4) * 128), tensor(3073, 64, dtype=wide)
    for inverse in (False, True):
        gradients.rotate(qkv, table, table, tensor(ROWS, dtype=torch.int32), 4, qkv, inverse=inverse)
    logits, labels = tensor(ROWS, CHANNELS, VOCAB), tensor(ROWS, CHANNELS, dtype=torch.int64)
    weights, losses = tensor(CHANNELS, dtype=wide), tensor(ROWS, CHANNELS, dtype=wide)
    for gradient in (False, True):
        gradients.cross_entropy(logits, labels, weights, losses, gradient=gradient)


def main(targets: str, dtypes: str) -> None:
    for target in targets.split(","):
        for dtype in dtypes.split(","):
            with ahead.compiling(target) as compiled:
                launches(getattr(torch, dtype))
            for item in compiled:
                found = line(item, target, dtype, 0)
                print(json.dumps(dataclasses.asdict(found) | {"violations": violations(found)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
