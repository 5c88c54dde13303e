"""The configuration of a Dia checkpoint: one frozen tree, whichever library wrote the file.

Three spellings are read: transformers 5 (token ids in `decoder_config`, RoPE in `rope_parameters`), transformers 4
(token ids at the top level, RoPE in `rope_theta`) and the original package, whose files follow transformers 4.
The files of the original package from before June 2025 are nested differently and belong to weights that compute
something else; they are recognised and refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dia_fast.errors import CheckpointError, shown
from dia_fast.files import checked_path, read_json
from dia_fast.warn import warn

DELAY_PATTERN = (0, 8, 9, 10, 11, 12, 13, 14, 15)

OLD_GENERATION = (
    "this is the first generation of Dia-1.6B (April 2025), which rotates the queries and keys of cross-attention and "
    "samples by other rules; run by the present rules it would speak noise, so it is refused. "
    "Use its successor, nari-labs/Dia-1.6B-0626."
)

# fmt: off
# Written by transformers into every configuration; none of them changes what Dia computes when it generates.
_GENERIC = {
    "architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "experts_implementation",
    "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "model_type", "name_or_path", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "task_specific_params", "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "use_cache", "use_return_dict",
}
# What transformers 4 kept of the generation settings in a model's configuration; the front door has its own.
_GENERATION = {
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "guidance_scale", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature",
    "tf_legacy_loss", "top_k", "top_p", "typical_p", "use_bfloat16",
}
# fmt: on
_STACK_EXTRAS = frozenset(
    {"hidden_act", "rope_parameters", "rope_scaling", "rope_theta", "cross_attention_hidden_size"}
)
_TOP = {"encoder_config", "decoder_config", "delay_pattern", "norm_eps"}
# So that a mistyped number is an error, not a list of a billion layers or a table of a billion positions.
_LARGEST = {
    "num_hidden_layers": 1000,
    "num_channels": 1000,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "cross_num_attention_heads": 1 << 12,
    "cross_num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "cross_head_dim": 1 << 12,
    "max_position_embeddings": 1 << 17,
}
_LARGEST_SIZE = 1 << 20
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class EncoderConfig:
    """The text encoder. Sizes count elements, `norm_eps` and `rope_theta` are plain numbers."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 128
    vocab_size: int = 256
    max_position_embeddings: int = 1024
    norm_eps: float = 1e-5
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        _check_stack("encoder_config", self)


@dataclass(frozen=True)
class DecoderConfig:
    """The audio decoder. `cross_hidden_size` is the width of the encoder output that cross-attention reads."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 18
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    cross_num_attention_heads: int = 16
    cross_num_key_value_heads: int = 16
    cross_head_dim: int = 128
    cross_hidden_size: int = 1024
    num_channels: int = 9
    vocab_size: int = 1028
    max_position_embeddings: int = 3072
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    eos_token_id: int = 1024
    pad_token_id: int = 1025
    bos_token_id: int = 1026

    def __post_init__(self) -> None:
        _check_stack("decoder_config", self)
        for name in _TOKENS:
            if getattr(self, name) >= self.vocab_size:
                raise CheckpointError(
                    f"decoder_config.{name} is {getattr(self, name)}, outside the vocabulary of {self.vocab_size} codes"
                )
        if len({getattr(self, name) for name in _TOKENS}) < len(_TOKENS):
            raise CheckpointError(
                "decoder_config: bos, eos and pad must be three different codes, got "
                + ", ".join(f"{name} = {getattr(self, name)}" for name in _TOKENS)
            )


@dataclass(frozen=True)
class DiaConfig:
    """A whole model. The defaults are those of `nari-labs/Dia-1.6B-0626`.

    delay_pattern: for each channel, by how many steps its codes are late; the first must be 0.
    Raises CheckpointError for values that cannot work or that this package does not compute.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    delay_pattern: tuple[int, ...] = DELAY_PATTERN

    def __post_init__(self) -> None:
        for name, kind in (("encoder", EncoderConfig), ("decoder", DecoderConfig), ("delay_pattern", tuple)):
            if not isinstance(getattr(self, name), kind):
                raise CheckpointError(f"{name} must be a {kind.__name__}, not {shown(getattr(self, name))}")
        if len(self.delay_pattern) != self.decoder.num_channels:
            raise CheckpointError(
                f"delay_pattern has {len(self.delay_pattern)} entries, but decoder_config.num_channels is "
                f"{self.decoder.num_channels}: one delay per channel is needed"
            )
        for delay in self.delay_pattern:
            _integer("delay_pattern", delay, minimum=0)
        if self.delay_pattern[0] != 0:
            raise CheckpointError(
                f"delay_pattern starts with {self.delay_pattern[0]}; only patterns whose first channel has delay 0 are "
                "supported, because the end of speech is read off channel 0"
            )
        if max(self.delay_pattern) > self.decoder.max_position_embeddings - 2:
            raise CheckpointError(
                f"delay_pattern has a delay of {shown(max(self.delay_pattern))} steps: the decoder's "
                f"{self.decoder.max_position_embeddings} positions (decoder_config.max_position_embeddings) leave no "
                "room for a frame of sound"
            )
        if self.decoder.cross_hidden_size != self.encoder.hidden_size:
            raise CheckpointError(
                f"decoder_config.cross_hidden_size is {self.decoder.cross_hidden_size}, but the encoder output that "
                f"cross-attention reads is {self.encoder.hidden_size} wide (encoder_config.hidden_size)"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DiaConfig":
        """Read the contents of a `config.json`, whichever library wrote it. A field that is absent has its default.

        Raises CheckpointError for the first generation of Dia, for another model, for a field of a wrong type and
        for an unknown field of the encoder or the decoder (it might change what the model computes). Elsewhere tools
        leave notes of their own, so that an unknown field is a warning.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(f"config: expected an object of named fields, got {type(data).__name__}")
        if isinstance(data.get("model"), Mapping) and ("data" in data or "encoder" in data["model"]):
            raise CheckpointError(f"config: {OLD_GENERATION}")
        kind = data.get("model_type", "dia")
        if kind != "dia":
            raise CheckpointError(f"config: model_type is {shown(kind)}; only 'dia' can be loaded")
        if "model_type" not in data and not {"encoder_config", "decoder_config"} & set(data):
            raise CheckpointError(
                "config: neither model_type nor encoder_config nor decoder_config is there: not a Dia configuration"
            )
        if notes := _unknown(data, _TOP | set(_TOKENS)):
            warn(
                "config: fields that are not known here are ignored: "
                + ", ".join(f"{name:.40} = {shown(data[name])}" for name in notes),
                UserWarning,
            )
        encoder = _read_stack(EncoderConfig, "encoder_config", data)
        decoder = _read_stack(DecoderConfig, "decoder_config", data)
        # transformers 5 lets a token id at the top level, where version 4 wrote it, override the decoder's own.
        decoder.update({name: _token(name, data[name]) for name in _TOKENS if data.get(name) is not None})
        delays = data.get("delay_pattern")
        if delays is None:
            delays = DELAY_PATTERN
        if not isinstance(delays, list | tuple):
            raise CheckpointError(f"config: delay_pattern must be a list of integers, got {shown(delays)}")
        return cls(EncoderConfig(**encoder), DecoderConfig(**decoder), tuple(delays))

    @classmethod
    def from_file(cls, path: str | Path) -> "DiaConfig":
        """Read a `config.json`. Raises CheckpointError, naming the file, if it is missing, broken or unsupported."""
        path = checked_path(path)
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def to_transformers(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers 4 and 5 both read."""
        encoder, decoder = _write_stack(self.encoder), _write_stack(self.decoder)
        for stack, kind in ((encoder, "dia_encoder"), (decoder, "dia_decoder")):
            theta = stack["rope_theta"]
            stack |= {"model_type": kind, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        top: dict[str, Any] = {
            "architectures": ["DiaForConditionalGeneration"],
            "model_type": "dia",
            "is_encoder_decoder": True,
            "delay_pattern": list(self.delay_pattern),
            "encoder_config": encoder,
            "decoder_config": decoder | {"is_encoder_decoder": True},
        }
        # Version 5 warns about token ids here and version 4 has the usual ones as its defaults.
        usual = DecoderConfig()
        top |= {name: decoder[name] for name in _TOKENS if decoder[name] != getattr(usual, name)}
        return top

    def to_original(self) -> dict[str, Any]:
        """The contents of a `config.json` that the original package reads (its form since June 2025)."""
        decoder = _write_stack(self.decoder)
        tokens = {name: decoder.pop(name) for name in _TOKENS}
        return {
            "architectures": ["DiaForConditionalGeneration"],
            "model_type": "dia",
            "is_encoder_decoder": True,
            "delay_pattern": list(self.delay_pattern),
            "encoder_config": _write_stack(self.encoder) | {"model_type": "dia_encoder"},
            "decoder_config": decoder | {"model_type": "dia_decoder"},
        } | tokens


def _check_stack(where: str, stack: EncoderConfig | DecoderConfig) -> None:
    for item in fields(stack):
        value = getattr(stack, item.name)
        if item.type is float or item.type == "float":
            _number(f"{where}.{item.name}", value)
        else:
            _integer(f"{where}.{item.name}", value, minimum=0 if item.name in _TOKENS else 1)
            if value > _LARGEST.get(item.name, _LARGEST_SIZE):
                raise CheckpointError(f"config: {where}.{item.name} is {shown(value)}, more than any real model has")
    if stack.head_dim % 2:
        raise CheckpointError(f"{where}.head_dim is {stack.head_dim}; rotary embeddings need an even one")
    for prefix in ("", "cross_") if isinstance(stack, DecoderConfig) else ("",):
        heads, shared = (getattr(stack, f"{prefix}num_{kind}_heads") for kind in ("attention", "key_value"))
        if heads % shared:
            raise CheckpointError(
                f"{where}: {prefix}num_attention_heads ({heads}) is not a multiple of "
                f"{prefix}num_key_value_heads ({shared})"
            )


def _integer(where: str, value: Any, minimum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(f"config: {where} must be an integer of at least {minimum}, got {shown(value)}")
    return value


def _number(where: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise CheckpointError(f"config: {where} must be a positive number, got {shown(value)}")
    return float(value)


def _token(where: str, value: Any) -> int:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return _integer(where, value, minimum=0)


def _unknown(data: Mapping[str, Any], known: set[str]) -> list[str]:
    """Unknown fields. Those that say "off" are harmless: None, False, 0 and empty containers pass."""
    known = known | _GENERIC | _GENERATION
    return [name for name, value in data.items() if value and not name.startswith("_") and name not in known]


def _read_stack(kind: type[EncoderConfig] | type[DecoderConfig], where: str, top: Mapping[str, Any]) -> dict[str, Any]:
    data = top.get(where)
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise CheckpointError(f"config: {where} must be an object of named fields, got {shown(data)}")
    names = {item.name for item in fields(kind)}
    for name in _unknown(data, names | _STACK_EXTRAS | set(_TOKENS)):
        raise CheckpointError(
            f"config: unknown field {where}.{name:.40} = {shown(data[name])}; it may change the result, so "
            "it is not ignored. If it does not matter, take it out of config.json"
        )
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config: {where}.hidden_act is {shown(data['hidden_act'])}; only 'silu' is supported")
    values = {name: data[name] for name in names - set(_TOKENS) if name in data}
    if data.get("num_key_value_heads", 1) is None:
        values["num_key_value_heads"] = values.get("num_attention_heads", kind.num_attention_heads)
    if kind is DecoderConfig:
        values |= {name: _token(f"{where}.{name}", data[name]) for name in _TOKENS if data.get(name) is not None}
    return values | _read_rope(where, data)


def _read_rope(where: str, data: Mapping[str, Any]) -> dict[str, float]:
    theta = data.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = data.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"config: {where}.{name} must be an object or null, got {shown(rope)}")
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling != "default":
            raise CheckpointError(
                f"config: {where}.{name} asks for RoPE of type {shown(scaling)}; only 'default' is supported"
            )
        theta = rope.get("rope_theta", theta)
    return {} if theta is None else {"rope_theta": _number(f"{where}.rope_theta", theta)}


def _write_stack(stack: EncoderConfig | DecoderConfig) -> dict[str, Any]:
    return {item.name: getattr(stack, item.name) for item in fields(stack)} | {"hidden_act": "silu"}
