"""Tiny checkpoints with random weights, in both official layouts, for tests and benchmarks.

The transformers layout is written by transformers itself. The original layout is written from the same tensors by the
rules of the original package (`DenseGeneral`: input axes first), independently of dia_fast.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig

if TYPE_CHECKING:
    from transformers import DiaForConditionalGeneration


def tiny_config(encoder: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, **top: Any) -> DiaConfig:
    """Return a small model with the vocabulary and the delays of the real one; arguments override fields."""
    encoder_config = EncoderConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    decoder_config = DecoderConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        cross_num_attention_heads=2,
        cross_num_key_value_heads=2,
        cross_head_dim=16,
        cross_hidden_size=(encoder or {}).get("hidden_size", 32),
        max_position_embeddings=320,
    )
    return DiaConfig(replace(encoder_config, **encoder or {}), replace(decoder_config, **decoder or {}), **top)


def random_state(config: DiaConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a state_dict of `DiaForConditionalGeneration`, scaled so that logits differ by a few units."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in _transformers_model(config).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif "embed" not in name:
            # Queries and keys are not scaled down in attention, so theirs must be smaller.
            gain = 0.5 if "q_proj" in name or "k_proj" in name else 1.0
            values *= gain * shape[1] ** -0.5
        state[name] = values.to(dtype)
    return state


def transformers_model(
    config: DiaConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> "DiaForConditionalGeneration":
    """Return the model of transformers with `random_state` in it, in evaluation mode."""
    model = _transformers_model(config).to(dtype)
    model.load_state_dict(random_state(config, seed, dtype))
    return model.eval()


def make_transformers_checkpoint(
    path: str | Path,
    config: DiaConfig | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
) -> Path:
    """Write a folder as `DiaForConditionalGeneration.save_pretrained` does; returns its path."""
    transformers_model(config or tiny_config(), seed, dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)


def make_original_checkpoint(
    path: str | Path,
    config: DiaConfig | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    file: str = "model.safetensors",
) -> Path:
    """Write a folder with the same weights as the original package has them; returns its path.

    file: the name of the weights; `.safetensors` as `DiaModel.save_pretrained` writes it, else what `torch.save` does.
    """
    from safetensors.torch import save_file

    config = config or tiny_config()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = original_state(config, random_state(config, seed, dtype))
    if file.endswith(".safetensors"):
        save_file(state, path / file, metadata={"format": "pt"})
    else:
        torch.save(state, path / file)
    (path / "config.json").write_text(json.dumps(config.to_original(), indent=2))
    return path


def original_state(config: DiaConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the transformers layout, rearranged to those of the original package."""
    found: dict[str, Tensor] = {}
    decoder = config.decoder
    for full_name, tensor in state.items():
        name = full_name.removeprefix("model.")
        stack = config.encoder if name.startswith("encoder.") else decoder
        head_dim = decoder.cross_head_dim if "cross_attention" in name else stack.head_dim
        if name == "logits_dense.weight":
            found["decoder.logits_dense.weight"] = tensor.T.reshape(-1, decoder.num_channels, decoder.vocab_size)
        elif name == "decoder.embeddings.embed.weight":
            for channel, table in enumerate(tensor.split(decoder.vocab_size)):
                found[f"decoder.embeddings.{channel}.weight"] = table
        elif "gate_up_proj" in name:
            found[name.replace("gate_up_proj", "wi_fused")] = tensor.T.reshape(-1, 2, stack.intermediate_size)
        elif "down_proj" in name:
            found[name.replace("down_proj", "wo")] = tensor.T
        elif "o_proj" in name:
            found[name] = tensor.T.reshape(-1, head_dim, stack.hidden_size)
        elif "_proj" in name:
            found[name] = tensor.T.reshape(tensor.shape[1], -1, head_dim)
        else:
            found[name] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _transformers_model(config: DiaConfig) -> "DiaForConditionalGeneration":
    from transformers import DiaConfig as TransformersConfig
    from transformers import DiaForConditionalGeneration

    return DiaForConditionalGeneration(TransformersConfig(**config.to_transformers()))
