"""Configurations and dtypes of both generations of Dia-1.6B, by the names that the original package gives them."""

import json
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch

from dia_fast.errors import InputError, shown
from dia_fast.model import config as native
from dia_fast.model.config import DiaConfig, first_generation_fields
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


_NEEDED = object()
Self = TypeVar("Self", bound="Fields")


class Fields:
    """Named values that do not change, with what programs use of pydantic's models.

    FORMS: the fields of each form with their defaults; a value belongs to the first form that knows all its fields.
    """

    FORMS: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __init__(self, **values: Any) -> None:
        """values: by the names of one form; names of neither are ignored, as the original does. Raises InputError."""
        form = max(self.FORMS, key=lambda form: sum(name in form for name in values))
        if missing := [name for name, default in form.items() if default is _NEEDED and name not in values]:
            raise InputError(f"{type(self).__name__} needs a value for {', '.join(missing)}")
        vars(self).update({name: values.get(name, default) for name, default in form.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        raise InputError(f"{type(self).__name__}.{name} cannot be changed: use model_copy(update=...)")

    @classmethod
    def model_validate(cls: type[Self], data: Any, **_: Any) -> Self:
        """One from a mapping, or one as it is. Raises InputError."""
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise InputError(f"{cls.__name__} must be an object of named fields, not {shown(data)}")
        return cls(**data)

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """The fields and their values."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def model_copy(self: Self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """One with other values for some fields."""
        return type(self)(**vars(self) | dict(update or {}))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(json.dumps(self.model_dump(), sort_keys=True, default=str))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def _plain(value: Any) -> Any:
    """A configuration of anybody's as a dictionary; anything else as it is."""
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else value


_STACK = {"hidden_act": "silu", "initializer_range": 0.02, "rope_scaling": None}
_FIRST_STACK = {"n_layer": _NEEDED, "n_embd": _NEEDED, "n_hidden": _NEEDED}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _sizes(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind()).items() if name not in _TOKENS}


class EncoderConfig(Fields):
    """The text encoder, in the form of either generation."""

    FORMS = (
        _sizes(native.EncoderConfig) | _STACK | {"model_type": "dia_encoder"},
        _FIRST_STACK | {"n_head": _NEEDED, "head_dim": _NEEDED},
    )


class DecoderConfig(Fields):
    """The audio decoder, in the form of either generation."""

    FORMS = (
        _sizes(native.DecoderConfig) | _STACK | {"model_type": "dia_decoder"},
        _FIRST_STACK | dict.fromkeys(
            ("gqa_query_heads", "kv_heads", "gqa_head_dim", "cross_query_heads", "cross_head_dim"), _NEEDED
        ),
    )  # fmt: skip


class DataConfig(Fields):
    """Lengths, special codes and delays, of the first generation."""

    FORMS = (
        {
            "text_length": _NEEDED, "audio_length": _NEEDED, "channels": 9, "text_pad_value": 0,
            "audio_eos_value": 1024, "audio_pad_value": 1025, "audio_bos_value": 1026,
            "delay_pattern": list(native.DELAY_PATTERN),
        },
    )  # fmt: skip


class ModelConfig(Fields):
    """Both stacks and what they share, of the first generation."""

    FORMS = (
        {
            "encoder": _NEEDED, "decoder": _NEEDED, "src_vocab_size": 128, "tgt_vocab_size": 1028, "dropout": 0.0,
            "normalization_layer_epsilon": 1e-5, "weight_dtype": "float32", "rope_min_timescale": 1,
            "rope_max_timescale": 10_000,
        },
    )  # fmt: skip

    def __init__(self, **values: Any) -> None:
        kinds = {"encoder": EncoderConfig, "decoder": DecoderConfig}
        parts = {name: kind.model_validate(values[name]) for name, kind in kinds.items() if name in values}
        super().__init__(**values | parts)


class TrainingConfig(Fields):
    """Settings of a training of the first generation; they do not tell what a model computes."""

    FORMS = ({"dtype": "bfloat16", "logits_dot_in_fp32": False},)


class OriginalConfig:
    """A configuration under the original's names.

    `config.decoder_config.num_channels`, `config.eos_token_id`, and of the first generation
    `config.data.audio_length`, `config.model.decoder.n_layer`. Any has both.

    config: one of dia_fast. fields: or the original's own, as keywords, of either generation; those that are not given
    have the values of Dia-1.6B-0626. Raises CheckpointError for a field that cannot be.
    """

    architectures = ("DiaForConditionalGeneration",)
    initializer_range = 0.02
    is_encoder_decoder = True
    model_type = "dia"
    torch_dtype = "float32"
    version = "1.0"

    def __init__(self, config: DiaConfig | None = None, /, **fields: Any) -> None:
        if config is not None and not isinstance(config, DiaConfig):
            raise InputError(f"config must be a DiaConfig of dia_fast, or fields by name, not {shown(config)}")
        if config is None:
            plain = {name: _plain(value) for name, value in fields.items()}
            config = DiaConfig.from_dict({"model_type": "dia"} | plain)
        elif fields:
            raise InputError("give a configuration or fields by name, not both")
        self.native = config

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "OriginalConfig | None":
        """Read a `config.json`; None if there is no such file. Raises CheckpointError for one that cannot be used."""
        path = checked_path(path)
        return cls(DiaConfig.from_file(path)) if path.is_file() else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `config.json` that the original package reads. Makes its folder. Raises InputError."""
        path = checked_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=2), encoding="utf-8")

    @classmethod
    def model_validate(cls, data: Any, **_: Any) -> "OriginalConfig":
        """A configuration from a mapping, or one as it is. Raises CheckpointError, InputError."""
        return cls(as_config(data))

    @classmethod
    def model_validate_json(cls, data: str | bytes, **_: Any) -> "OriginalConfig":
        """A configuration from the text of a `config.json`. Raises CheckpointError, InputError."""
        try:
            return cls.model_validate(json.loads(data))
        except (ValueError, TypeError) as error:
            raise InputError(f"config: not JSON: {error}") from None

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """The contents of a `config.json` that the original package reads."""
        return self.native.to_original()

    def model_dump_json(self, *, indent: int | None = None, **_: Any) -> str:
        """As `model_dump`, as text."""
        return json.dumps(self.model_dump(), indent=indent)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "OriginalConfig":
        """One with other values for some fields of `model_dump`. Raises CheckpointError."""
        return type(self)(**self.model_dump() | dict(update or {}))

    @property
    def encoder_config(self) -> EncoderConfig:
        return EncoderConfig(**vars(self.native.encoder))

    @property
    def decoder_config(self) -> DecoderConfig:
        return DecoderConfig(**vars(self.native.decoder))

    @property
    def model(self) -> ModelConfig:
        """The sizes in the form of the first generation."""
        return ModelConfig(**first_generation_fields(self.native)["model"])

    @property
    def data(self) -> DataConfig:
        """The lengths and special codes in the form of the first generation."""
        return DataConfig(**first_generation_fields(self.native)["data"])

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig()

    @property
    def delay_pattern(self) -> list[int]:
        return list(self.native.delay_pattern)

    @property
    def norm_eps(self) -> float:
        return self.native.decoder.norm_eps

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
    data = _plain(config)
    if not isinstance(data, Mapping):
        raise InputError(f"config must be a configuration of Dia, not {type(config).__name__}")
    return DiaConfig.from_dict(data)
