"""Calls that go the model's own way, and the warning about them."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DiaForConditionalGeneration, GenerationConfig

from dia_fast.errors import InputError
from dia_fast.generation.sampling_params import RANDOM_SEED
from dia_fast.utils.warn import warn

# Inputs that the engine takes; every other one of `forward` asks for something that only the model itself can do.
INPUTS = {"inputs", "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
# Arguments of `generate` itself that say nothing about the result, or that are sampling parameters.
_HARMLESS = {"self", "generation_config", "use_model_defaults", "streamer", "kwargs"}

_PARAMS = frozenset(vars(GenerationConfig()))


class FallbackWarning(UserWarning):
    """A call of `generate` that the engine cannot serve and that the model serves as if it were not accelerated."""


def asks_for_more(arguments: inspect.BoundArguments) -> str | None:
    """The first argument of `generate` that the engine cannot honour, or None."""
    given = arguments.arguments
    for name, value in given.items():
        if name not in INPUTS | _HARMLESS and _is_set(value):
            return name
    for name, value in given.get("kwargs", {}).items():
        if name not in INPUTS and name not in _PARAMS and value is not None:
            return name
    return None


def _is_set(value: Any) -> bool:
    """Tell whether an argument says something: None, False and an empty list do not."""
    return value is not None and value is not False and not (isinstance(value, list) and not value)


def asks_for_more_in_config(config: GenerationConfig) -> str | None:
    """The first setting about the model's own loop and cache, or about more results than the engine has, or None."""
    for name in ("compile_config", "cache_implementation", "prefill_chunk_size", "low_memory"):
        if getattr(config, name, None):
            return name
    if getattr(config, "use_cache", None) is False:
        return "use_cache"
    if config.return_dict_in_generate:
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                return name
    return None


def say(reason: str) -> None:
    """Warn that a call goes the model's own way."""
    warn(f"generate runs as transformers' own, not on dia-fast: {reason}", FallbackWarning)


@contextlib.contextmanager
def own_random_numbers(model: DiaForConditionalGeneration, seed: int | list[int] | None) -> Iterator[None]:
    """Let the model's own sampling start from a seed, and leave torch's random numbers as they were."""
    if seed is None or seed == RANDOM_SEED:
        yield
        return
    if not isinstance(seed, int):
        raise InputError("seed: a list of seeds needs the engine, and this call cannot run on it; give one int")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
