"""Helpers for tests of the front door: a tiny model and a tiny codec on disk, and a look at what a folder holds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dia_fast.api import Dia
from dia_fast.audio.codec import CodecConfig, random_codec
from dia_fast.checkpoint.saving import save_pretrained
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.model.fused_weights import fused_shapes

TEXT = "[S1] Did you hear that? [S2] Hear what?"
TINY = DiaConfig(
    EncoderConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    ),
    DecoderConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        cross_num_attention_heads=2,
        cross_num_key_value_heads=2,
        cross_head_dim=16,
        cross_hidden_size=32,
        max_position_embeddings=200,
    ),
)


def make_model(folder: Path, config: DiaConfig = TINY) -> Path:
    """A checkpoint with random weights in the transformers layout."""
    weights = {}
    for name, shape in fused_shapes(config).items():
        values = torch.randn(shape)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif "embedding" not in name:
            values *= shape[1] ** -0.5
        weights[name] = values
    return save_pretrained(folder, config, weights)


def make_brief_model(folder: Path, config: DiaConfig = TINY) -> Path:
    """As `make_model`, but speech often ends soon, for tests of what comes after."""
    make_model(folder, config)
    weights = load_file(folder / "model.safetensors")
    weights["logits_dense.weight"][config.decoder.eos_token_id] *= 1.7  # often the likeliest code of channel 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_codec(folder: Path, **sizes: Any) -> Path:
    """A codec at 44.1 kHz with the hop and the codebooks of the real one, but few channels."""
    return random_codec(CodecConfig(encoder_hidden_size=4, decoder_hidden_size=32, **sizes)).save_pretrained(folder)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the contents of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextlib.contextmanager
def refused(kind: type[DiaFastError], message: str, folder: Path) -> Iterator[None]:
    """Expect `kind` with `message` in it, and the folder as it was."""
    before = tree(folder)
    with pytest.raises(kind) as caught:
        yield
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert tree(folder) == before


def make_dia(folder: Path, dtype: torch.dtype = torch.float32, **limits: Any) -> Dia:
    """A loaded model that ends its speech now and then, sooner or later, with a codec of this dtype."""
    torch.manual_seed(1)
    codec = random_codec(CodecConfig(encoder_hidden_size=4, decoder_hidden_size=32), dtype=dtype)
    dia = Dia.from_pretrained(make_model(folder / "model"), codec=codec, device="cpu", **limits)
    dia.model.decoder.head[dia.config.decoder.eos_token_id] *= 2
    return dia
