"""The configuration and the dtypes as the original package names them."""

import json
import os
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch

from dia_fast.errors import InputError, shown
from dia_fast.model import config as native
from dia_fast.model.config import DiaConfig
from dia_fast.utils.files import checked_path, replacing


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


@dataclass(frozen=True)
class EncoderConfig(native.EncoderConfig):
    """The text encoder: `EncoderConfig` of `dia_fast.model.config`, as a dictionary by `model_dump`."""

    def model_dump(self) -> dict[str, Any]:
        """The fields and their values."""
        return asdict(self)


@dataclass(frozen=True)
class DecoderConfig(native.DecoderConfig):
    """The audio decoder: `DecoderConfig` of `dia_fast.model.config`, as a dictionary by `model_dump`."""

    def model_dump(self) -> dict[str, Any]:
        """The fields and their values."""
        return asdict(self)


class OriginalConfig:
    """A configuration under the original's names: `config.decoder_config.num_channels`, `config.eos_token_id`.

    config: one of dia_fast. fields: or the original's own, as keywords; those that are not given have the values of
    Dia-1.6B-0626. Raises CheckpointError for a field that cannot be.
    """

    def __init__(self, config: DiaConfig | None = None, /, **fields: Any) -> None:
        if config is not None and not isinstance(config, DiaConfig):
            raise InputError(f"config must be a DiaConfig of dia_fast, or fields by name, not {shown(config)}")
        if config is None:
            parts = {"model_type": "dia"}
            for name, value in fields.items():
                dump = getattr(value, "model_dump", None)
                parts[name] = dump() if callable(dump) else value
            config = DiaConfig.from_dict(parts)
        elif fields:
            raise InputError("give a configuration or fields by name, not both")
        self.native = config

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "OriginalConfig | None":
        """Reads a `config.json`; None if there is no such file. Raises CheckpointError for one that cannot be used."""
        path = checked_path(path)
        return cls(DiaConfig.from_file(path)) if path.is_file() else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `config.json` that the original package reads. Makes its folder. Raises InputError."""
        path = checked_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=2), encoding="utf-8")

    @classmethod
    def model_validate(cls, data: Any) -> "OriginalConfig":
        """A configuration from a mapping, or one as it is. Raises CheckpointError, InputError."""
        return cls(as_config(data))

    def model_dump(self) -> dict[str, Any]:
        """The contents of a `config.json` that the original package reads."""
        return self.native.to_original()

    def model_dump_json(self, *, indent: int | None = None) -> str:
        """As `model_dump`, as text."""
        return json.dumps(self.model_dump(), indent=indent)

    @property
    def encoder_config(self) -> EncoderConfig:
        return EncoderConfig(**asdict(self.native.encoder))

    @property
    def decoder_config(self) -> DecoderConfig:
        return DecoderConfig(**asdict(self.native.decoder))

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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OriginalConfig) and self.native == other.native

    def __hash__(self) -> int:
        return hash(self.native)

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
