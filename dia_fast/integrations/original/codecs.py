"""Whatever encodes and decodes sound for the original's `Dia`, behind two functions."""

from typing import Any, Protocol

import torch
from torch import Tensor

from dia_fast.audio.codec import Codec
from dia_fast.errors import InputError

SAMPLE_RATE = 44_100


class SoundCodec(Protocol):
    """Mono sound at 44.1 kHz to codes and back."""

    def encode(self, samples: Tensor) -> Tensor:
        """`[n]` float32 to `[frames, channels]`."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """`[frames, channels]` to `[n]` float32."""
        ...


class _Descript:
    """A `dac.DAC` of descript-audio-codec."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, samples: Tensor) -> Tensor:
        place = next(self.model.parameters())
        return self.model.encode(self.model.preprocess(samples.to(place)[None, None], SAMPLE_RATE))[1][0].T

    def decode(self, codes: Tensor) -> Tensor:
        place = next(self.model.parameters())
        latents = self.model.quantizer.from_codes(codes.to(place.device, torch.int64).T[None])[0]
        return self.model.decode(latents).reshape(-1).float()


class _Transformers:
    """A `transformers.DacModel`, the `audio_tokenizer` of a processor."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, samples: Tensor) -> Tensor:
        hop = self.model.config.hop_length
        padded = torch.nn.functional.pad(samples, (0, -len(samples) % hop))
        place = next(self.model.parameters())
        return self.model.encode(padded.to(place)[None, None]).audio_codes[0].T

    def decode(self, codes: Tensor) -> Tensor:
        codes = codes.to(self.model.device, torch.int64).T[None]
        return self.model.decode(audio_codes=codes).audio_values.reshape(-1).float()


def as_codec(model: Any) -> SoundCodec:
    """The interface above for a `Codec`, a `dac.DAC` or a `transformers.DacModel`. Raises InputError for others."""
    if isinstance(model, Codec):
        return model
    if hasattr(model, "preprocess") and hasattr(model, "quantizer"):
        return _Descript(model)
    if hasattr(model, "encode") and hasattr(getattr(model, "config", None), "downsampling_ratios"):
        return _Transformers(model)
    raise InputError(
        f"dac_model must be a dac.DAC, a transformers.DacModel or a Codec of dia_fast, not {type(model).__name__}"
    )
