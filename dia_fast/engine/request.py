"""Engine request and result types."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dia_fast.errors import InputError, shown
from dia_fast.generation.sampling_params import AnySamplingParams, SamplingParams, random_seed
from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import FREE, apply_delay
from dia_fast.utils.values import tensor_of, whole_number


@dataclass(frozen=True)
class Request:
    """One text to speak.

    Args:
        text_ids: Bytes of the text.
        prompt: `[frames, channels]` integer codes to go on from, or None.
        max_new_tokens: Most steps to generate, the `max(delay)` that complete the last frames included.
        guidance_scale: As in `SamplingParams`.
        temperature: 0 takes the likeliest code.
        top_k: As in `SamplingParams`.
        top_p: As in `SamplingParams`.
        seed: None draws one.
        delayed_codes: Instead of a prompt, the first delayed codes themselves, `[steps, channels]` integers from step 0
            on, special ones too, and -1 where the model chooses: never in step 0, and always in channel 0 after the
            first choice.
        guidance_steps: Guide the first so many decode steps only; None for all. The steps after them compute no
            unconditional half, and its pages are free.
        extras: Values of this request for extras of the engine's `Hooks`, by name: tensors or numbers.

    Raises:
        InputError: For values that cannot work.
    """

    text_ids: Sequence[int]
    prompt: Tensor | None = None
    max_new_tokens: int = 3072
    guidance_scale: float | None = 3.0
    temperature: float = 1.2
    top_k: int | None = 45
    top_p: float = 0.95
    seed: int | None = None
    delayed_codes: Tensor | None = None
    guidance_steps: int | None = None
    extras: Mapping[str, Tensor | float] | None = None

    PARAMS: ClassVar[type[SamplingParams]] = SamplingParams

    def __post_init__(self) -> None:
        params = self.PARAMS(
            max_new_tokens=self.max_new_tokens,
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )
        object.__setattr__(self, "_params", params)
        if self.guidance_steps is not None:
            whole_number("guidance_steps", self.guidance_steps, 1, None, "None guides all steps")
            if not params.guided:
                raise InputError("guidance_steps: the request has no guidance; give a guidance_scale other than 1")
        for name in ("prompt", "delayed_codes"):
            codes = getattr(self, name)
            if codes is not None and (not isinstance(codes, Tensor) or codes.dtype == torch.bool or codes.is_complex()):
                raise InputError(f"{name} must be an integer tensor, not {shown(codes)}")
            if codes is not None:
                tensor_of(name, codes)
        if self.extras is not None and not isinstance(self.extras, Mapping):
            raise InputError(f"extras must be a dict of tensors by name, not {shown(self.extras)}")
        if not isinstance(self.text_ids, Sequence) or not all(type(item) is int for item in self.text_ids):
            raise InputError(f"text_ids must be a sequence of integers, not {shown(self.text_ids)}")

    @property
    def params(self) -> SamplingParams:
        """The checked parameters, made once: the scheduler asks for them in every step."""
        return self._params  # type: ignore[attr-defined]


class AnyRequest(Request):
    """A request whose guidance and temperature have no bounds but those of float32's precision."""

    PARAMS = AnySamplingParams


@dataclass(frozen=True)
class Generation:
    """The codes that a request gave.

    Attributes:
        frames: `[frames, channels]` int64, the new ones only, every code a sound.
        delayed_codes: `[steps, channels]` int32, from step 0 on, special codes and prompt included.
        seed: The one used.
        truncated: The length limit ended it, not the model.
    """

    frames: Tensor
    delayed_codes: Tensor
    seed: int
    truncated: bool


@dataclass(frozen=True)
class Plan:
    """A checked request in terms of steps.

    Attributes:
        request: As submitted.
        delayed_codes: `[first + max(delay) + 1, channels]` int32: what the prompt determines, -1 elsewhere.
        first: The step decoding starts at.
        end: The last step: there are never more than `end + 1`.
        seed: The one used.
    """

    request: Request
    delayed_codes: Tensor
    first: int
    end: int
    seed: int

    @property
    def guided(self) -> bool:
        """True if a second, unconditional row is computed, at first at least."""
        return self.request.params.guided

    @cached_property
    def prompt_bytes(self) -> bytes:
        """The delayed codes that are prefilled."""
        return self.delayed_codes[: self.first].numpy().tobytes()

    @property
    def last_guided(self) -> float:
        """The last step with guidance; infinity without an end."""
        steps = self.request.guidance_steps
        return math.inf if steps is None else self.first + steps - 1


def plan(config: DiaConfig, request: Request) -> Plan:
    """Check text and prompt against the model's sizes.

    Raises:
        InputError: If they do not fit.
    """
    decoder, encoder = config.decoder, config.encoder
    if not 0 < len(request.text_ids) <= encoder.max_position_embeddings:
        raise InputError(
            f"text_ids holds {len(request.text_ids)} ids; from 1 to {encoder.max_position_embeddings} can be encoded"
        )
    if not all(0 <= item < encoder.vocab_size for item in request.text_ids):
        raise InputError(f"text_ids must be from 0 to {encoder.vocab_size - 1}, got {list(request.text_ids)[:20]}")
    seed = random_seed() if request.seed is None else request.seed
    if request.delayed_codes is not None:
        delayed_codes, first = _given_codes(config, request)
        end = min(first + request.max_new_tokens, decoder.max_position_embeddings)
        return Plan(request, delayed_codes, first, end, seed)
    prompt = request.prompt
    if prompt is None:
        prompt = torch.empty(0, decoder.num_channels, dtype=torch.int32, device="cpu")
    sound = decoder.eos_token_id
    if prompt.ndim != 2 or prompt.shape[1] != decoder.num_channels or prompt.is_floating_point():
        raise InputError(
            f"prompt must be integer codes of shape [frames, {decoder.num_channels}], got {prompt.dtype} of shape "
            f"{list(prompt.shape)}"
        )
    if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < sound:
        raise InputError(f"prompt: codes must be from 0 to {sound - 1}, got {int(prompt.min())} to {int(prompt.max())}")
    frames, limit = prompt.shape[0], decoder.max_position_embeddings
    if frames >= limit:
        raise InputError(f"prompt has {frames} frames and the model only {limit} positions; use a shorter prompt")
    delayed_codes = apply_delay(prompt.cpu(), config.delay_pattern, decoder.bos_token_id)
    return Plan(request, delayed_codes, frames, min(frames + request.max_new_tokens, limit), seed)


def _given_codes(config: DiaConfig, request: Request) -> tuple[Tensor, int]:
    """A request's delayed codes, `[first + max(delay) + 1, channels]` int32, and the last step that is complete."""
    decoder, codes = config.decoder, request.delayed_codes
    assert codes is not None
    if request.prompt is not None:
        raise InputError("delayed_codes: give a prompt or delayed codes, not both")
    if codes.ndim != 2 or codes.shape[1] != decoder.num_channels or codes.is_floating_point() or not len(codes):
        raise InputError(
            f"delayed_codes must be integer codes of shape [steps, {decoder.num_channels}] with a first step, got "
            f"{codes.dtype} of shape {list(codes.shape)}"
        )
    low, high = int(codes.min()), int(codes.max())
    if low < FREE or high >= decoder.vocab_size:
        raise InputError(f"delayed_codes: codes must be from 0 to {decoder.vocab_size - 1}, or -1, got {low} to {high}")
    codes = codes.to("cpu", torch.int32)
    complete = (codes != FREE).all(1).long().cumprod(0)
    first = int(complete.sum()) - 1
    room = first + max(config.delay_pattern) + 1
    if first < 0 or (codes[first + 1 :, 0] != FREE).any() or (codes[room:] != FREE).any():
        raise InputError(
            f"delayed_codes: after the complete steps, of which there must be one, channel 0 must be -1, and all codes "
            f"after {max(config.delay_pattern)} more steps"
        )
    if first >= decoder.max_position_embeddings:
        raise InputError(
            f"delayed_codes has {first + 1} complete steps and the model only {decoder.max_position_embeddings}"
        )
    whole = torch.full((room, decoder.num_channels), FREE, dtype=torch.int32, device="cpu")
    whole[: len(codes)] = codes[:room]
    return whole, first
