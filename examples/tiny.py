"""A tiny checkpoint, codec and voice for the examples: everything that the official names stand for, made on the spot.

The weights are random, so that what is spoken is noise. Nothing is downloaded.
"""

import os
from pathlib import Path

from dia_fast.codec import random_codec
from examples.demo import CODEC, SEED, make_model, make_voice


def make(folder: Path) -> tuple[Path, Path, Path]:
    """Writes a model with its processor, a codec and a voice; returns their paths."""
    model, codec, voice = folder / "model", folder / "codec", folder / "voice.wav"
    if not voice.exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_model(model)
        random_codec(CODEC, seed=SEED).save_pretrained(codec)
        save_processor(model, codec, name=str(codec.resolve()))
        make_voice(voice)
    return model, codec, voice


def save_processor(model: str | os.PathLike[str], codec: str | os.PathLike[str], *, name: str) -> None:
    """Writes what `AutoProcessor` reads beside a model. name: where the codec will be found."""
    from transformers import DacModel, DiaFeatureExtractor, DiaProcessor, DiaTokenizer

    audio_tokenizer = DacModel.from_pretrained(codec)
    audio_tokenizer.name_or_path = name
    extractor = DiaFeatureExtractor(sampling_rate=44_100, hop_length=512)
    DiaProcessor(extractor, DiaTokenizer(), audio_tokenizer).save_pretrained(model)
