"""The configuration of a DAC codec, whichever library wrote it, and the lengths that follow from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dia_fast.audio.audio import HIGHEST_RATE, LOWEST_RATE
from dia_fast.errors import CheckpointError, shown

# A block has one residual unit for each of these dilations, with a convolution of this width in it.
DILATIONS = (1, 3, 9)
KERNEL = 7

# transformers' name -> the name in the `metadata.kwargs` of a descript-audio-codec file.
_OFFICIAL = {
    "encoder_hidden_size": "encoder_dim",
    "downsampling_ratios": "encoder_rates",
    "decoder_hidden_size": "decoder_dim",
    "upsampling_ratios": "decoder_rates",
    "hidden_size": "latent_dim",
    "n_codebooks": "n_codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "sampling_rate": "sample_rate",
}

# No real codec comes near; what is larger is a mistake, and would hang or fill the memory before a tensor is read.
_WIDEST, _MOST_BLOCKS, _LONGEST_HOP = 1 << 16, 16, 1 << 16
_BOUNDS = {
    "encoder_hidden_size": (1, _WIDEST),
    "decoder_hidden_size": (1, _WIDEST),
    "n_codebooks": (1, 128),
    "codebook_size": (1, 1 << 20),
    "codebook_dim": (1, 1 << 12),
    "sampling_rate": (LOWEST_RATE, HIGHEST_RATE),
}


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a DAC; the defaults are those of the 44.1 kHz model that Dia was trained on.

    Args:
        downsampling_ratios: Stride of each encoder block; their product is the hop.
        upsampling_ratios: Stride of each decoder block, same product; empty means the other way round.
        hidden_size: Width of the latent that is quantised; 0 means `encoder_hidden_size * 2 **
            len(downsampling_ratios)`.

    Raises:
        CheckpointError: For a value of a wrong type or sizes that do not fit together.
    """

    encoder_hidden_size: int = 64
    downsampling_ratios: tuple[int, ...] = (2, 4, 8, 8)
    decoder_hidden_size: int = 1536
    upsampling_ratios: tuple[int, ...] = ()
    hidden_size: int = 0
    n_codebooks: int = 9
    codebook_size: int = 1024
    codebook_dim: int = 8
    sampling_rate: int = 44_100

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "downsampling_ratios", _ratios("downsampling_ratios", self.downsampling_ratios))
        given = self.upsampling_ratios
        upsampling = self.downsampling_ratios[::-1] if isinstance(given, list | tuple) and not given else given
        put(self, "upsampling_ratios", _ratios("upsampling_ratios", upsampling))
        for name, (least, most) in _BOUNDS.items():
            _require_within(name, getattr(self, name), least, most)
        if isinstance(self.hidden_size, int) and self.hidden_size == 0:
            put(self, "hidden_size", self.encoder_hidden_size * 2 ** len(self.downsampling_ratios))
        _require_within("hidden_size", self.hidden_size, 1, _WIDEST)
        _require_within(
            "encoder_hidden_size * 2 ** len(downsampling_ratios)",
            self.encoder_hidden_size * 2 ** len(self.downsampling_ratios),
            1,
            _WIDEST,
        )
        if math.prod(self.upsampling_ratios) != self.hop_length:
            raise CheckpointError(
                f"codec config: upsampling_ratios {list(self.upsampling_ratios)} do not undo downsampling_ratios "
                f"{list(self.downsampling_ratios)}: their products differ"
            )
        if self.decoder_hidden_size % 2 ** len(self.upsampling_ratios):
            raise CheckpointError(
                f"codec config: decoder_hidden_size {self.decoder_hidden_size} cannot be halved "
                f"{len(self.upsampling_ratios)} times, once per upsampling ratio"
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.downsampling_ratios)

    def samples_of(self, frames: int) -> int:
        """Samples that `frames` decode to: `frames * hop_length`, less a few where an upsampling ratio is odd."""
        if frames == 0:
            return 0
        count = frames
        for stride in self.upsampling_ratios:
            count = count * stride - stride % 2
        return count

    @property
    def decode_context_frames(self) -> int:
        """Frames needed on either side of a frame so that its samples come out as in the whole.

        The samples of frame 0 are followed back through the decoder: a convolution widens the range by its padding, a
        transposed one (kernel 2s, stride s, padding p) maps outputs first..last to inputs (first + p - 2s + 1) / s
        rounded up .. (last + p) / s rounded down.
        """
        reach = sum(KERNEL // 2 * dilation for dilation in DILATIONS)
        first, last = -(KERNEL // 2), self.hop_length - 1 + KERNEL // 2
        for stride in reversed(self.upsampling_ratios):
            padding = math.ceil(stride / 2)
            first = -((reach - first - padding + 2 * stride - 1) // stride)
            last = (last + reach + padding) // stride
        return max(KERNEL // 2 - first, last + KERNEL // 2)

    @classmethod
    def from_transformers(cls, data: Any, preprocessor: Any = None) -> "CodecConfig":
        """Read the contents of `config.json` and, if there is one, of `preprocessor_config.json`.

        The latter's sampling rate counts where both have one: it is what transformers resamples to. Fields that are
        not known are ignored: what a file does not say by its tensors' shapes has no effect on a DAC.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(f"codec config: expected an object with named fields, got {type(data).__name__}")
        kind = data.get("model_type", "dac")
        if kind != "dac":
            raise CheckpointError(
                f"codec config: model_type is {shown(kind)}; only 'dac' is a codec that can be loaded"
            )
        values = {name: data[name] for name in _OFFICIAL if data.get(name) is not None}
        if preprocessor is not None and not isinstance(preprocessor, Mapping):
            raise CheckpointError(
                f"codec config: the preprocessor's must be an object with named fields, got {shown(preprocessor)}"
            )
        if preprocessor is not None and preprocessor.get("sampling_rate") is not None:
            values["sampling_rate"] = preprocessor["sampling_rate"]
        config = cls(**values)
        if data.get("hop_length", config.hop_length) != config.hop_length:
            raise CheckpointError(
                f"codec config: hop_length is {shown(data['hop_length'])}, but downsampling_ratios "
                f"{list(config.downsampling_ratios)} multiply to {config.hop_length}"
            )
        return config

    @classmethod
    def from_official(cls, kwargs: Any) -> "CodecConfig":
        """Read `metadata["kwargs"]` of a descript-audio-codec file: the arguments of `dac.DAC`."""
        if not isinstance(kwargs, Mapping):
            raise CheckpointError("codec file: metadata.kwargs, the sizes of the network, is missing")
        values = {name: kwargs[other] for name, other in _OFFICIAL.items() if kwargs.get(other) is not None}
        width = values.get("codebook_dim")
        if (
            isinstance(width, list | tuple)
            and width
            and all(item == width[0] for item in width)
            and len(width) == values.get("n_codebooks", 9)
        ):
            values["codebook_dim"] = width[0]
        return cls(**values)

    def to_transformers(self) -> dict[str, Any]:
        """The contents of a `config.json` for `transformers.DacModel`."""
        ratios = {
            "downsampling_ratios": list(self.downsampling_ratios),
            "upsampling_ratios": list(self.upsampling_ratios),
        }
        sizes = {name: getattr(self, name) for name in _OFFICIAL if name not in ratios}
        return {"architectures": ["DacModel"], "model_type": "dac", "hop_length": self.hop_length} | ratios | sizes

    def to_official(self) -> dict[str, Any]:
        """The arguments that make `dac.DAC` build this network."""
        values = {other: getattr(self, name) for name, other in _OFFICIAL.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_preprocessor(self) -> dict[str, Any]:
        """The contents of a `preprocessor_config.json` for `transformers.DacFeatureExtractor`."""
        return {
            "feature_extractor_type": "DacFeatureExtractor",
            "feature_size": 1,
            "hop_length": self.hop_length,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": self.sampling_rate,
        }


def _require_within(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise CheckpointError(f"codec config: {name} must be a whole number from {least} to {most}, not {shown(value)}")


def _ratios(name: str, value: Any) -> tuple[int, ...]:
    whole = isinstance(value, list | tuple) and all(isinstance(ratio, int) and ratio >= 2 for ratio in value)
    if not whole or not 1 <= len(value) <= _MOST_BLOCKS or math.prod(value) > _LONGEST_HOP:
        raise CheckpointError(
            f"codec config: {name} must be a list of 1 to {_MOST_BLOCKS} whole numbers of at least 2 whose product is "
            f"at most {_LONGEST_HOP}, not {shown(value)}"
        )
    return tuple(value)
