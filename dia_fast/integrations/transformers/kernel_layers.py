"""Our RMSNorm for Hugging Face's package `kernels`, for any model whose norm is published to it as `"RMSNorm"`.

from kernels import Mode, kernelize, use_kernel_mapping

with use_kernel_mapping(kernel_mapping()):
    kernelize(model, mode=Mode.TRAINING, device="cuda")
"""

from typing import Any

from torch import Tensor, nn

from dia_fast.integrations.transformers.modules import gradient_ops
from dia_kernels.autograd import differentiable


class RMSNorm(nn.Module):
    """Only its forward is used, as a method of a norm with `weight` and `variance_epsilon`, as transformers' have.

    Normalises in float32 and rounds once, after the weight. Differentiable.
    """

    has_backward = True
    can_torch_compile = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm: Any = self
        ops = gradient_ops("auto", hidden_states.device)
        return differentiable.rms_norm(hidden_states, norm.weight, norm.variance_epsilon, ops)


class Installed:
    """A layer that is at hand: what `kernels` calls a repository, with nothing to download."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer = layer

    def load(self) -> type[nn.Module]:
        return self.layer

    def __str__(self) -> str:
        return f"dia-fast ({self.layer.__name__})"


RMS_NORM = Installed(RMSNorm)  # `kernels` keeps what it has loaded by this object


def kernel_mapping() -> dict[str, dict[str, Installed]]:
    """For `kernels.use_kernel_mapping` or `kernels.register_kernel_mapping`. Triton on a GPU, torch on a CPU."""
    return {"RMSNorm": {"cpu": RMS_NORM, "cuda": RMS_NORM, "rocm": RMS_NORM}}
