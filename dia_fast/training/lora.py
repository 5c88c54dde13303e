"""Low-rank adapters: `x @ weight.T + scale * (x @ a.T) @ b.T` with a frozen weight. Source: Hu et al. 2021, "LoRA".

An adapter belongs to a fused weight. On disk it has the layout of the PEFT library, in which q, k and v each have one:
they share their `a` and divide the rows of `b`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_fast.checkpoint.tensor_io import save_safetensors
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, fused_slices
from dia_fast.training.data import generator


class LoRA(nn.Module):
    """The adapter of one weight `[out, in]`: a `[rank, in]`, random; b `[out, rank]`, zero at first; both float32."""

    def __init__(self, out_features: int, in_features: int, rank: int, scale: float, name: str, seed: int) -> None:
        super().__init__()
        drawn = torch.randn(
            rank, in_features, generator=generator(seed, f"adapter {name}"), dtype=torch.float32, device="cpu"
        )
        self.a = nn.Parameter(drawn * in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device="cpu"))
        self.scale = scale

    def added(self, x: Tensor) -> Tensor:
        """Compute what the adapter adds to `x @ weight.T`, in the dtype of x."""
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the adapter in it, in the dtype and on the device of the weight."""
        change = (self.b @ self.a).detach() * self.scale
        return (weight.float() + change.to(weight.device)).to(weight.dtype)


def make_adapters(config: DiaConfig, targets: tuple[str, ...], rank: int, alpha: float, seed: int) -> dict[str, LoRA]:
    """An adapter for every fused weight whose last name is among `targets`, by fused name; the scale is alpha / rank.

    The same seed gives the same adapters.
    """
    shapes = fused_shapes(config)
    chosen = [name for name in shapes if ".layers." in name and name.rsplit(".", 1)[1] in targets]
    return {name: LoRA(shapes[name][0], shapes[name][1], rank, alpha / rank, name, seed) for name in chosen}


def save_adapters(folder: Path, config: DiaConfig, adapters: Mapping[str, LoRA], base: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT does.

    Args:
        base: The checkpoint adapted.
    """
    tensors, modules = {}, set()
    for tensor, (fused, first, last) in fused_slices(config).items():
        if fused in adapters:
            adapter, module = adapters[fused], tensor.removesuffix(".weight")
            modules.add(".".join(module.rsplit(".", 2)[1:]))
            tensors[f"base_model.model.{module}.lora_A.weight"] = adapter.a.detach().cpu().clone()
            tensors[f"base_model.model.{module}.lora_B.weight"] = adapter.b.detach()[first:last].cpu().clone()
    one = next(iter(adapters.values()))
    rank = one.a.shape[0]
    adapter_config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": one.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")
