"""A tiny checkpoint, codec and voice for the examples: everything that the official names stand for, made on the spot.

The weights are random, so that what is spoken is noise. Nothing is downloaded.
"""

import os
from pathlib import Path

import numpy as np
import soundfile
import torch

from dia_fast import DiaConfig
from dia_fast.audio.codec import CodecConfig, random_codec
from dia_fast.checkpoint.saving import save_pretrained
from dia_fast.model.config import DecoderConfig, EncoderConfig
from dia_fast.model.fused_weights import fused_shapes

SEED = 7

# Dia's own vocabularies, channels and delays, in a model of some three million weights.
MODEL = DiaConfig(
    EncoderConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    ),
    DecoderConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        cross_num_attention_heads=4,
        cross_num_key_value_heads=4,
        cross_head_dim=32,
        cross_hidden_size=64,
    ),
)
# The frame rate and the codebooks of the codec that Dia speaks through, at an eighth of its width.
CODEC = CodecConfig(encoder_hidden_size=8, decoder_hidden_size=192)


def make_model(folder: Path) -> None:
    """Write random weights as a checkpoint that transformers would load too."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in fused_shapes(MODEL).items():
        weight = torch.randn(shape, generator=generator)
        is_norm, is_table = len(shape) == 1, name.endswith("embedding")
        # Outputs of unit variance, so that logits differ by a few units.
        weights[name] = 1 + 0.1 * weight if is_norm else weight if is_table else weight * shape[1] ** -0.5
    save_pretrained(folder, MODEL, weights)


def make_voice(path: Path) -> None:
    """Write 1.2 seconds of a buzz with a moving pitch: stereo at 22.05 kHz, neither of which the codec takes."""
    rate = 22_050
    seconds = np.arange(int(1.2 * rate)) / rate
    phase = 2 * np.pi * (120 * seconds + 8 * np.sin(2 * np.pi * seconds))
    buzz = sum(np.sin(k * phase) / k for k in range(1, 12)) * 0.2 * np.sin(np.pi * seconds / 1.2)
    soundfile.write(path, np.stack([buzz, 0.8 * buzz], axis=1), rate)


def make(folder: Path) -> tuple[Path, Path, Path]:
    """Write a model with its processor, a codec and a voice; return their paths."""
    model, codec, voice = folder / "model", folder / "codec", folder / "voice.wav"
    if not voice.exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_model(model)
        random_codec(CODEC, seed=SEED).save_pretrained(codec)
        save_processor(model, codec, name=str(codec.resolve()))
        make_voice(voice)
    return model, codec, voice


def save_processor(model: str | os.PathLike[str], codec: str | os.PathLike[str], *, name: str) -> None:
    """Write what `AutoProcessor` reads beside a model. name: where the codec will be found."""
    from transformers import DacModel, DiaFeatureExtractor, DiaProcessor, DiaTokenizer

    audio_tokenizer = DacModel.from_pretrained(codec)
    audio_tokenizer.name_or_path = name
    extractor = DiaFeatureExtractor(sampling_rate=44_100, hop_length=512)
    DiaProcessor(extractor, DiaTokenizer(), audio_tokenizer).save_pretrained(model)
