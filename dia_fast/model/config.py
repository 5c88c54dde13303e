"""The configuration of a Dia checkpoint: one frozen tree, whichever library wrote the file.

Three spellings are read: transformers 5 (token ids in `decoder_config`, RoPE in `rope_parameters`), transformers 4
(token ids at the top level, RoPE in `rope_theta`) and the original package, whose files follow transformers 4.
The files of the original package from before June 2025 are nested differently and belong to the first generation of
Dia-1.6B, which computes something else from tensors of the same names: only the configuration tells the two apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dia_fast.errors import CheckpointError, shown
from dia_fast.utils.files import checked_path, read_json
from dia_fast.utils.warn import warn

DELAY_PATTERN = (0, 8, 9, 10, 11, 12, 13, 14, 15)

# fmt: off
# Written by transformers into every configuration; none of them changes what Dia computes when it generates.
_GENERIC = {
    "architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "experts_implementation",
    "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "model_type", "name_or_path", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "task_specific_params", "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "use_cache", "use_return_dict",
}
# What transformers 4 kept of the sampling parameters in a model's configuration; the front door has its own.
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
# quantization_config repeats what the names and dtypes of the tensors say.
_TOP = {"encoder_config", "decoder_config", "delay_pattern", "norm_eps", "quantization_config"}
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

    Args:
        delay_pattern: For each channel, by how many steps its codes are late; the first must be 0.
        first_generation: The rules of `nari-labs/Dia-1.6B` of April 2025: cross-attention rotates its queries and keys,
            and codes are sampled from the guided logits.

    Raises:
        CheckpointError: For values that cannot work or that this package does not compute.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    delay_pattern: tuple[int, ...] = DELAY_PATTERN
    first_generation: bool = False

    def __post_init__(self) -> None:
        kinds = {"encoder": EncoderConfig, "decoder": DecoderConfig, "delay_pattern": tuple, "first_generation": bool}
        for name, kind in kinds.items():
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

        Raises:
            CheckpointError: For another model, for a field of a wrong type and for an unknown field of the encoder or
                the decoder (it might change what the model computes). Elsewhere tools leave notes of their own, so that
                an unknown field is a warning.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(f"config: expected an object of named fields, got {type(data).__name__}")
        if isinstance(data.get("model"), Mapping) and ("data" in data or "encoder" in data["model"]):
            return cls(**_read_first_generation(data))
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
        """Read a `config.json`.

        Raises:
            CheckpointError: Naming the file, if it is missing, broken or unsupported.
        """
        path = checked_path(path)
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def to_transformers(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers 4 and 5 both read.

        Raises:
            CheckpointError: For the first generation, which transformers would run by the rules of the second.
        """
        if self.first_generation:
            raise CheckpointError(
                "the first generation of Dia-1.6B has no transformers layout: transformers would run it by the rules "
                "of the second and speak noise. Write the layout 'original'"
            )
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
        """The contents of a `config.json` that the original package reads, in the version of the model's generation."""
        if self.first_generation:
            return _write_first_generation(self)
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


# The fields of the first generation's files, and what they are here.
_FIRST_STACK = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_hidden": "intermediate_size"}
_FIRST_ENCODER = _FIRST_STACK | {"n_head": "num_attention_heads", "head_dim": "head_dim"}
_FIRST_DECODER = _FIRST_STACK | {
    "gqa_query_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "gqa_head_dim": "head_dim",
    "cross_query_heads": "cross_num_attention_heads",
    "cross_head_dim": "cross_head_dim",
}
_FIRST_TOKENS = {f"audio_{name}_value": f"{name}_token_id" for name in ("eos", "pad", "bos")}
_POSITIONS = 128  # the original rounds lengths up to a multiple of it


def _read_first_generation(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DiaConfig` from the nested file of the first generation."""

    def part(section: Mapping[str, Any], where: str, name: str) -> Mapping[str, Any]:
        value = section.get(name)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config: {where}{name} must be an object of named fields, got {shown(value)}")
        return value

    def numbers(section: Mapping[str, Any], where: str, names: Mapping[str, str]) -> dict[str, Any]:
        if missing := [name for name in names if name not in section]:
            raise CheckpointError(f"config: {where}.{missing[0]} is missing")
        return {ours: _integer(f"{where}.{name}", section[name], 1) for name, ours in names.items()}

    def positions(name: str) -> int:
        return -(-_integer(f"data.{name}", sizes.get(name), 1) // _POSITIONS) * _POSITIONS

    model, sizes = part(data, "", "model"), part(data, "", "data")
    if model.get("rope_min_timescale", 1) != 1:
        raise CheckpointError(
            f"config: model.rope_min_timescale is {shown(model['rope_min_timescale'])}; only 1 is supported"
        )
    if sizes.get("text_pad_value", 0) != 0:
        raise CheckpointError(f"config: data.text_pad_value is {shown(sizes['text_pad_value'])}; only 0 is supported")
    shared = {
        "norm_eps": model.get("normalization_layer_epsilon", 1e-5),
        "rope_theta": _number("model.rope_max_timescale", model.get("rope_max_timescale", 10_000)),
    }
    encoder = numbers(part(model, "model.", "encoder"), "model.encoder", _FIRST_ENCODER)
    decoder = numbers(part(model, "model.", "decoder"), "model.decoder", _FIRST_DECODER)
    tokens = {ours: _token(f"data.{name}", sizes[name]) for name, ours in _FIRST_TOKENS.items() if name in sizes}
    delays = sizes.get("delay_pattern", DELAY_PATTERN)
    if not isinstance(delays, list | tuple):
        raise CheckpointError(f"config: data.delay_pattern must be a list of integers, got {shown(delays)}")
    return {
        "encoder": EncoderConfig(
            **encoder, **shared, num_key_value_heads=encoder["num_attention_heads"],
            vocab_size=_integer("model.src_vocab_size", model.get("src_vocab_size", 128), 1),
            max_position_embeddings=positions("text_length"),
        ),
        "decoder": DecoderConfig(
            **decoder, **shared, **tokens, cross_hidden_size=encoder["hidden_size"],
            cross_num_key_value_heads=decoder["cross_num_attention_heads"],
            num_channels=_integer("data.channels", sizes.get("channels", 9), 1),
            vocab_size=_integer("model.tgt_vocab_size", model.get("tgt_vocab_size", 1028), 1),
            max_position_embeddings=positions("audio_length"),
        ),
        "delay_pattern": tuple(delays),
        "first_generation": True,
    }  # fmt: skip


def first_generation_fields(config: DiaConfig) -> dict[str, Any]:
    """A configuration under the names of the first generation's files, `model` and `data`, of whichever it is."""
    encoder, decoder = config.encoder, config.decoder
    return {
        "version": "1.0",
        "model": {
            "encoder": {name: getattr(encoder, ours) for name, ours in _FIRST_ENCODER.items()},
            "decoder": {name: getattr(decoder, ours) for name, ours in _FIRST_DECODER.items()},
            "src_vocab_size": encoder.vocab_size,
            "tgt_vocab_size": decoder.vocab_size,
            "dropout": 0.0,
            "normalization_layer_epsilon": encoder.norm_eps,
            "weight_dtype": "float32",
            "rope_min_timescale": 1,
            "rope_max_timescale": int(encoder.rope_theta),
        },
        "training": {},
        "data": {
            "text_length": encoder.max_position_embeddings,
            "audio_length": decoder.max_position_embeddings,
            "channels": decoder.num_channels,
            "text_pad_value": 0,
            **{name: getattr(decoder, ours) for name, ours in _FIRST_TOKENS.items()},
            "delay_pattern": list(config.delay_pattern),
        },
    }


def _write_first_generation(config: DiaConfig) -> dict[str, Any]:
    """The file that `_read_first_generation` reads. Raises CheckpointError for what it cannot say."""
    written = first_generation_fields(config)
    if DiaConfig(**_read_first_generation(written)) != config:
        raise CheckpointError(
            "this configuration cannot be written as one of the first generation, which has one head of keys for each "
            f"query of the encoder and of cross-attention, and lengths that are multiples of {_POSITIONS}"
        )
    return written


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
