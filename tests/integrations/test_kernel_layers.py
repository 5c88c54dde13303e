"""Our layers through Hugging Face's package `kernels`, as a model that publishes its norm to it takes them."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.dia.modeling_dia import DiaRMSNorm

from dia_fast.integrations.transformers import kernel_layers, kernel_mapping
from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping


@use_kernel_forward_from_hub("RMSNorm")
class Norm(DiaRMSNorm):
    """As transformers publishes it where the version of `kernels` is one that it wants."""


def norms(dtype: torch.dtype) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(Norm(48, 1e-5), nn.Linear(48, 48), Norm(48, 1e-5))
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator).to(dtype))
    return model.to(dtype)


def value_and_gradients(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    value = model(x.to(model[1].weight.dtype))
    value.double().square().sum().backward()
    return [value.double().detach(), *(parameter.grad.double() for parameter in model.parameters())]


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.INFERENCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_takes_our_norm(dtype: torch.dtype, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are no further from float64 than with the model's own norm, which rounds once more.

    A tenth is left for luck: in float32 the two round equally often.
    """
    weights: list[Tensor] = []
    real = kernel_layers.differentiable.rms_norm
    monkeypatch.setattr(kernel_layers.differentiable, "rms_norm", lambda *a: weights.append(a[1]) or real(*a))
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = norms(dtype).double()
    wanted = value_and_gradients(exact, x)
    theirs, model = value_and_gradients(norms(dtype), x), norms(dtype)
    assert not weights
    with use_kernel_mapping(kernel_mapping()):
        kernelize(model, mode=mode, device="cpu")
    ours = value_and_gradients(model, x)
    assert len(weights) == 2 and weights[0] is model[0].weight and weights[1] is model[2].weight
    for own, other, right in zip(ours, theirs, wanted, strict=True):
        assert (own - right).norm() <= 1.1 * (other - right).norm()
