"""The loss of a whole model and all its gradients, through the kernels and through torch."""

import pytest
import torch

from dia_fast.model import DiaModel
from dia_fast.packing import packed_shapes
from dia_fast.training import Example, batch_loss, build_batch
from dia_kernels import get_ops
from tests.checkpoints import tiny_config
from tests.kernels.support import random

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(dtype: torch.dtype, device: torch.device) -> None:
    layers = {"num_hidden_layers": 1}
    config = tiny_config(layers, layers)
    weights = {
        name: random(shape, torch.float32, device, seed, 0.3 if len(shape) > 1 else 1.0)
        for seed, (name, shape) in enumerate(packed_shapes(config).items())
    }
    generator = torch.Generator().manual_seed(0)
    examples = [Example([1, 72, 105], torch.randint(0, 1024, (frames, 9), generator=generator)) for frames in (3, 5)]
    batch = build_batch(examples, config).to(device)
    found = []
    for backend, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        copies = {name: weight.clone() for name, weight in weights.items()}
        model = DiaModel(config, get_ops(backend, device)).load(copies).requires_grad_(True)
        loss = batch_loss(model, batch, dtype=kind).mean
        loss.backward()
        found.append({"loss": loss.detach()} | {name: weight.grad for name, weight in model.named_parameters()})
    for name, exact in found[2].items():
        error, plain = ((result[name] - exact).double().norm() for result in found[:2])
        rounding = torch.finfo(dtype).eps / 2 * exact.norm()
        assert error <= 2 * plain + rounding, f"{name}: {error:.1e}, torch's own error is {plain:.1e}"
