"""Reading and writing configurations: every spelling, every refusal."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tools.tiny_models import tiny_config
from dia_fast.checkpoint.layouts import tensor_slices
from dia_fast.errors import CheckpointError
from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.model.fused_weights import fused_shapes, fused_slices, parameter_count
from tests.helpers.strategies import configs

ENCODER = {
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 77,
    "model_type": "dia_encoder",
    "norm_eps": 2e-05,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "vocab_size": 100,
}
DECODER = {
    "cross_head_dim": 8,
    "cross_hidden_size": 24,
    "cross_num_attention_heads": 4,
    "cross_num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 56,
    "initializer_range": 0.02,
    "intermediate_size": 72,
    "max_position_embeddings": 99,
    "model_type": "dia_decoder",
    "norm_eps": 3e-05,
    "num_attention_heads": 10,
    "num_channels": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 5,
    "vocab_size": 64,
}
ROPE = {"encoder_config": 100.0, "decoder_config": 200.0}
EXPECTED = DiaConfig(
    EncoderConfig(24, 40, 3, 6, 3, 16, 100, 77, 2e-5, 100.0),
    DecoderConfig(56, 72, 4, 10, 5, 32, 4, 2, 8, 24, 3, 64, 99, 3e-5, 200.0, 60, 61, 62),
    (0, 2, 5),
)


def transformers_4() -> dict[str, Any]:
    """Token ids at the top level, rope_theta beside rope_scaling, generation settings here and there."""
    return {
        "architectures": ["DiaForConditionalGeneration"],
        "bos_token_id": 62,
        "decoder_config": DECODER | {"rope_scaling": None, "rope_theta": 200.0, "use_cache": True},
        "delay_pattern": [0, 2, 5],
        "encoder_config": ENCODER | {"rope_scaling": None, "rope_theta": 100.0, "top_k": 50, "return_dict": True},
        "eos_token_id": 60,
        "initializer_range": 0.02,
        "is_encoder_decoder": True,
        "model_type": "dia",
        "norm_eps": 1e-05,
        "pad_token_id": 61,
        "torch_dtype": "float32",
        "transformers_version": "4.53.0.dev0",
        "use_cache": True,
    }


def transformers_5() -> dict[str, Any]:
    """Token ids in decoder_config, RoPE in rope_parameters."""
    rope = {name: {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}} for name, theta in ROPE.items()}
    tokens = {"bos_token_id": 62, "eos_token_id": 60, "pad_token_id": 61}
    return {
        "architectures": ["DiaForConditionalGeneration"],
        "bos_token_id": None,
        "decoder_config": DECODER | rope["decoder_config"] | tokens | {"is_encoder_decoder": True, "use_cache": True},
        "delay_pattern": [0, 2, 5],
        "dtype": "bfloat16",
        "encoder_config": ENCODER | rope["encoder_config"],
        "eos_token_id": None,
        "model_type": "dia",
        "pad_token_id": None,
        "transformers_version": "5.0.0",
    }


def original() -> dict[str, Any]:
    """The original package since June 2025."""
    return {
        "architectures": ["DiaForConditionalGeneration"],
        "bos_token_id": 62,
        "decoder_config": DECODER | {"rope_scaling": None, "rope_theta": 200},
        "delay_pattern": [0, 2, 5],
        "encoder_config": ENCODER | {"rope_scaling": None, "rope_theta": 100},
        "eos_token_id": 60,
        "initializer_range": 0.02,
        "is_encoder_decoder": True,
        "model_type": "dia",
        "norm_eps": 1e-05,
        "pad_token_id": 61,
        "torch_dtype": "float32",
        "transformers_version": "4.53.0.dev0",
    }


@pytest.mark.parametrize("spelling", [transformers_4, transformers_5, original])
def test_every_spelling_reads_alike(spelling: Any) -> None:
    assert DiaConfig.from_dict(json.loads(json.dumps(spelling()))) == EXPECTED


def test_defaults_are_the_published_model() -> None:
    assert DiaConfig.from_dict({"model_type": "dia"}) == DiaConfig()
    assert parameter_count(DiaConfig()) == 1_611_160_576


@given(configs())
def test_written_spellings_read_back(config: DiaConfig) -> None:
    for data in (config.to_transformers(), config.to_original()):
        assert DiaConfig.from_dict(json.loads(json.dumps(data))) == config


def test_transformers_reads_and_writes_the_same(tmp_path: Path) -> None:
    from transformers import DiaConfig as TransformersConfig

    theirs = TransformersConfig(**EXPECTED.to_transformers())
    assert theirs.decoder_config.eos_token_id == 60
    assert theirs.decoder_config.rope_parameters["rope_theta"] == 200.0
    assert DiaConfig.from_dict(theirs.to_dict()) == EXPECTED
    theirs.save_pretrained(tmp_path)
    assert DiaConfig.from_file(tmp_path / "config.json") == EXPECTED


def change(path: str, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(transformers_5()))
    *parents, name = path.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "bark", "model_type is 'bark'"),
        ("delay_pattern", [1, 2, 5], "starts with 1"),
        ("delay_pattern", [0, 2], "2 entries, but decoder_config.num_channels is 3"),
        ("delay_pattern", [0, -1, 2], "delay_pattern must be an integer of at least 0, got -1"),
        ("delay_pattern", "0, 2, 5", "delay_pattern must be a list"),
        ("delay_pattern", 7, "delay_pattern must be a list"),
        ("encoder_config", [1], r"encoder_config must be an object of named fields, got \[1\]"),
        ("encoder_config.hidden_size", "24", "encoder_config.hidden_size must be an integer of at least 1, got '24'"),
        ("encoder_config.hidden_size", 24.5, "got 24.5"),
        ("encoder_config.hidden_size", True, "got True"),
        ("encoder_config.hidden_size", 32, "cross_hidden_size is 24, but the encoder output"),
        ("encoder_config.hidden_act", "gelu", "encoder_config.hidden_act is 'gelu'; only 'silu'"),
        ("encoder_config.norm_eps", 0, "encoder_config.norm_eps must be a positive number, got 0"),
        ("encoder_config.norm_eps", float("nan"), "got nan"),
        ("encoder_config.head_dim", 15, "encoder_config.head_dim is 15; rotary embeddings need an even one"),
        ("encoder_config.sliding_window", 512, "unknown field encoder_config.sliding_window = 512"),
        ("decoder_config.logit_softcap", 30.0, "unknown field decoder_config.logit_softcap = 30.0"),
        ("decoder_config.num_attention_heads", 9, r"num_attention_heads \(9\) is not a multiple"),
        ("decoder_config.cross_num_attention_heads", 3, r"cross_num_attention_heads \(3\) is not a multiple"),
        ("decoder_config.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, more than any real model"),
        ("decoder_config.eos_token_id", 64, "eos_token_id is 64, outside the vocabulary of 64"),
        ("decoder_config.eos_token_id", 61, "three different codes"),
        ("decoder_config.eos_token_id", [60, 59], r"eos_token_id must be an integer of at least 0, got \[60, 59\]"),
        ("decoder_config.rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "RoPE of type 'yarn'"),
        ("decoder_config.rope_scaling", {"type": "linear", "factor": 2.0}, "RoPE of type 'linear'"),
        ("decoder_config.rope_scaling", 2.0, "rope_scaling must be an object or null, got 2.0"),
        ("decoder_config.rope_parameters", {"rope_theta": "1e4"}, "rope_theta must be a positive number, got '1e4'"),
    ],
)
def test_a_bad_field_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DiaConfig.from_dict(change(path, value))


def test_fields_that_change_nothing_are_tolerated() -> None:
    for path, value in (
        ("sliding_window", None),
        ("encoder_config.attention_bias", False),
        ("_attn_implementation_autoset", True),
        ("decoder_config.hidden_act", "swish"),
        ("decoder_config.eos_token_id", [60]),
    ):
        assert DiaConfig.from_dict(change(path, value)) == EXPECTED
    shared = change("encoder_config.num_key_value_heads", None)
    assert DiaConfig.from_dict(shared).encoder.num_key_value_heads == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unsloth_version", "2025.6"),
        ("unsloth_fixed", True),
        ("model_name", "dia"),
        ("auto_map", {"AutoModel": "modeling.Dia"}),
        ("license", "apache-2.0"),
        ("sampling_rate", 44100),
    ],
)
def test_notes_of_other_tools_are_a_warning(name: str, value: Any) -> None:
    with pytest.warns(UserWarning, match=f"not known here are ignored: {name} = "):
        assert DiaConfig.from_dict(change(name, value)) == EXPECTED
    with pytest.raises(CheckpointError, match=f"unknown field decoder_config.{name}"):
        DiaConfig.from_dict(change(f"decoder_config.{name}", value))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["encoder_config", "decoder_config", "delay_pattern", "model", "data", "eos_token_id", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_nonsense_is_refused_or_read(data: Any) -> None:
    try:
        DiaConfig.from_dict(data)
    except CheckpointError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ("{}", "not a Dia configuration"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        DiaConfig.from_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*nothing\.json: No such file"):
        DiaConfig.from_file(tmp_path / "nothing.json")


@given(configs())
def test_pieces_cover_every_packed_row_once(config: DiaConfig) -> None:
    shapes = fused_shapes(config)
    covered: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for fused, first, last in fused_slices(config).values():
        covered[fused].append((first, last))
    for name, ranges in covered.items():
        ranges.sort()
        assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
        assert ranges[-1][1] == shapes[name][0]


def test_slices_are_the_tensors_of_transformers() -> None:
    import torch
    from transformers import DiaConfig as TransformersConfig
    from transformers import DiaForConditionalGeneration

    for config in (DiaConfig(), EXPECTED, replace(tiny_config(), delay_pattern=(0, *range(8)))):
        with torch.device("meta"):
            model = DiaForConditionalGeneration(TransformersConfig(**config.to_transformers()))
        found = {name: part.shape for name, part in tensor_slices(config, "transformers").items()}
        assert found == {name: tuple(t.shape) for name, t in model.state_dict().items()}
