"""The loss of a whole model and all its gradients, through the kernels and through torch."""

import pytest
import torch

from bench.tools.tiny_models import tiny_config
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_fast.training import Example, batch_loss, build_batch
from dia_kernels import get_ops
from tests.kernels.support import random

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(dtype: torch.dtype, device: torch.device) -> None:
    layers = {"num_hidden_layers": 1}
    config = tiny_config(layers, layers)
    weights = {
        name: random(shape, torch.float32, device, seed, 0.3 if len(shape) > 1 else 1.0)
        for seed, (name, shape) in enumerate(fused_shapes(config).items())
    }
    generator = torch.Generator().manual_seed(0)
    examples = [Example([1, 72, 105], torch.randint(0, 1024, (frames, 9), generator=generator)) for frames in (3, 5)]
    batch = build_batch(examples, config).to(device)

    def results(backend: str, kind: torch.dtype, nudge: float = 0.0) -> dict[str, torch.Tensor]:
        copies = {
            name: weight * (1 + nudge * random(weight.shape, torch.float32, device, 1000 + seed, 1.0).sign())
            for seed, (name, weight) in enumerate(weights.items())
        }
        model = DiaModel(config, get_ops(backend, device)).load(copies).requires_grad_(True)
        loss = batch_loss(model, batch, dtype=kind).mean
        loss.backward()
        return {"loss": loss.detach()} | {name: weight.grad for name, weight in model.named_parameters()}

    unit = torch.finfo(dtype).eps / 2
    kernels, plain, exact = results("triton", dtype), results("torch", dtype), results("torch", torch.float64)
    # A sum in another order is the exact sum of slightly other numbers: weights moved by one rounding, both ways.
    moved = [results("torch", torch.float64, nudge) for nudge in (unit, -unit)]
    for name, truth in exact.items():
        error = (kernels[name] - truth).double().norm()
        allowed = 2 * sum((other[name] - truth).double().norm() for other in (plain, *moved)) + unit * truth.norm()
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"
