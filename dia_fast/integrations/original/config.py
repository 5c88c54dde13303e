"""The configuration and the dtypes as the original package names them."""

import os
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from dia_fast.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.errors import InputError


class ComputeDtype(str, Enum):
    """Type of weights and activations."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    def to_dtype(self) -> torch.dtype:
        """The dtype of torch."""
        kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        return kinds[self.value]

    @classmethod
    def _missing_(cls, value: object) -> "ComputeDtype":
        raise InputError(f"compute_dtype must be one of {', '.join(item.value for item in cls)}, not {value!r}")


class OriginalConfig:
    """A configuration under the original's names: `config.decoder_config.num_channels`, `config.eos_token_id`."""

    def __init__(self, config: DiaConfig) -> None:
        self.native = config

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "OriginalConfig | None":
        """Reads a `config.json`; None if there is no such file. Raises CheckpointError for one that cannot be used."""
        return cls(DiaConfig.from_file(Path(path))) if Path(path).is_file() else None

    @property
    def encoder_config(self) -> EncoderConfig:
        return self.native.encoder

    @property
    def decoder_config(self) -> DecoderConfig:
        return self.native.decoder

    @property
    def delay_pattern(self) -> list[int]:
        return list(self.native.delay_pattern)

    @property
    def bos_token_id(self) -> int:
        return self.native.decoder.bos_token_id

    @property
    def eos_token_id(self) -> int:
        return self.native.decoder.eos_token_id

    @property
    def pad_token_id(self) -> int:
        return self.native.decoder.pad_token_id

    def __repr__(self) -> str:
        return f"OriginalConfig({self.native!r})"


def as_config(config: Any) -> DiaConfig:
    """The configuration in any of the forms that a caller may have: ours, this module's, the original's, a mapping."""
    if isinstance(config, DiaConfig):
        return config
    if isinstance(config, OriginalConfig):
        return config.native
    dump = getattr(config, "model_dump", None)  # pydantic's, of the original package
    data = dump() if callable(dump) else config
    if not isinstance(data, dict):
        raise InputError(f"config must be a configuration of Dia, not {type(config).__name__}")
    return DiaConfig.from_dict(data)
