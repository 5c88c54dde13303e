"""Writes the untrained Dia of the demo voice, in the layout of transformers: what `dia-fast train` begins with.

python -m examples.demo_voice.model FOLDER [--seed 1]
"""

import argparse
import zlib
from pathlib import Path

import torch

from dia_fast.checkpoint.saving import save_pretrained
from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.model.fused_weights import fused_shapes

CODES = 256  # per codebook; end of speech, padding and begin of speech come after them
CONFIG = DiaConfig(
    EncoderConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
    ),
    DecoderConfig(
        hidden_size=320,
        intermediate_size=896,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        cross_num_attention_heads=4,
        cross_num_key_value_heads=4,
        cross_head_dim=64,
        cross_hidden_size=192,
        vocab_size=CODES + 4,
        max_position_embeddings=2048,
        eos_token_id=CODES,
        pad_token_id=CODES + 1,
        bos_token_id=CODES + 2,
    ),
)


def initial_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """One packed weight: projections keep the variance, what is added to the residual stream begins small."""
    if len(shape) == 1:
        return torch.ones(shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))
    stack, decoder = (CONFIG.decoder, True) if name.startswith("decoder") else (CONFIG.encoder, False)
    if name.endswith("embedding"):
        return weight * (CONFIG.decoder.num_channels**-0.5 if decoder else 1.0)
    weight *= shape[1] ** -0.5
    part = name.rsplit(".", 1)[1]
    if part in ("o", "cross_o", "down"):
        weight *= ((3 if decoder else 2) * stack.num_hidden_layers) ** -0.5
    # Attention is not scaled by 1 / sqrt(head_dim): queries and keys this small begin with an even softmax.
    elif part == "qkv":
        weight[: -stack.num_key_value_heads * stack.head_dim] *= stack.head_dim**-0.25
    elif part == "cross_q":
        weight *= CONFIG.decoder.cross_head_dim**-0.25
    elif part == "cross_kv":
        weight[: shape[0] // 2] *= CONFIG.decoder.cross_head_dim**-0.25
    return weight


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    shapes = fused_shapes(CONFIG)
    # Training computes on float32 copies; what it writes at the end has the dtype of what it began with.
    weights = {name: initial_weight(name, shape, options.seed).bfloat16() for name, shape in shapes.items()}
    save_pretrained(options.folder, CONFIG, weights)
    print(f"{options.folder}: {sum(torch.Size(shape).numel() for shape in shapes.values()):,} weights")


if __name__ == "__main__":
    main()
