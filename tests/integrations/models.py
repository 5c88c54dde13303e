"""Tiny models of transformers, and the inputs that its processor would make."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DiaForConditionalGeneration

from bench.tools.pairs import delayed_inputs, random_prompts, random_texts, text_inputs
from bench.tools.tiny_models import random_state, tiny_config, transformers_model
from dia_fast.model.config import DiaConfig

CONFIG = tiny_config()
TINY_VOCABULARY = tiny_config(
    decoder={
        "num_channels": 3,
        "vocab_size": 36,
        "eos_token_id": 32,
        "pad_token_id": 33,
        "bos_token_id": 34,
        "num_hidden_layers": 1,
    },
    encoder={"num_hidden_layers": 1},
    delay_pattern=(0, 1, 3),
)


def make_model(config: DiaConfig = CONFIG, seed: int = 1, eos_gain: float = 0.0) -> DiaForConditionalGeneration:
    """A model whose settings name its own special codes. eos_gain: see `bench.tools.pairs.pair`."""
    model = transformers_model(config, seed)
    state = random_state(config, seed)
    state["logits_dense.weight"][config.decoder.eos_token_id] *= eos_gain
    model.load_state_dict(state)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(config.decoder, name))
    model.generation_config.decoder_start_token_id = config.decoder.bos_token_id
    return model


def inputs(
    config: DiaConfig = CONFIG, texts: Sequence[int] = (17, 5, 40), prompts: Sequence[int] = (0, 12, 5)
) -> dict[str, Tensor]:
    """Random texts and audio prompts of these lengths as one batch."""
    grids = delayed_inputs(config, random_prompts(config, list(prompts)))
    return text_inputs(random_texts(config, list(texts))) | grids


def greedy(**settings: Any) -> dict[str, Any]:
    return {"do_sample": False, "max_new_tokens": 40, "guidance_scale": 3.0, "top_k": 45} | settings


def same_as_own(model: Any, given: dict[str, Any], **settings: Any) -> Tensor:
    """Generate with the accelerated model and with its class's own method, assert equality, return the rows."""
    ours = model.generate(**given, **settings)
    expected = type(model).generate(unaccelerated(model), **given, **settings)
    assert torch.equal(ours, expected)
    return ours


def unaccelerated(model: Any) -> DiaForConditionalGeneration:
    """A model of the same weights that nobody has patched."""
    other = type(model)(model.config).to(model.dtype)
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    other.generation_config = model.generation_config
    return other.eval()
