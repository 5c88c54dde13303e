"""Turn audio prompts, the voices to speak in, into codes.

An audio prompt is a path, a `Voice`, an `Audio`, a pair `(samples, sample_rate)`, or the codes themselves as an integer
tensor `[frames, channels]`. Everything but codes goes through the codec.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dia_fast.audio.audio import Audio, convert, load_audio
from dia_fast.audio.editing import best_part
from dia_fast.errors import AudioWarning, InputError, shown
from dia_fast.model.config import DiaConfig
from dia_fast.utils.ambient import isolated
from dia_fast.utils.values import tensor_of
from dia_fast.utils.warn import warn

if TYPE_CHECKING:
    from dia_fast.audio.codec import Codec


@dataclass(frozen=True)
class Voice:
    """A recording as codes, to speak in; made by `Dia.voice`.

    Args:
        codes: `[frames, channels]`.
        text: What is said in it, or "" if the text to be spoken begins with that.
    """

    codes: Tensor
    text: str


AudioPrompt: TypeAlias = str | os.PathLike[str] | Audio | Voice | tuple[Any, int] | Tensor | np.ndarray | None

KINDS = (
    "a path, a Voice or its name, an Audio, a pair (samples, sample_rate) or an integer tensor of codes "
    "[frames, channels]"
)
MIN_SECONDS = 0.02  # two frames of the codec
CUT_RATE = 44_100  # at which recordings are cut
_KEPT = 64  # recordings whose codes are remembered


def longest_prompt(config: DiaConfig) -> int:
    """Frames of the longest audio prompt that leaves positions for one new frame and the steps that complete it."""
    return config.decoder.max_position_embeddings - max(config.delay_pattern) - 2


def prompt_for_each(prompt: "AudioPrompt | Sequence[AudioPrompt]", count: int, listed: bool) -> list[AudioPrompt]:
    """One prompt, or None, for each of `count` texts.

    A list gives each text its own; anything else is for all of them.

    Args:
        listed: Whether the caller passed a list of texts; only then may the prompts be a list.

    Raises:
        InputError: For a list beside a single text or of another length.
    """
    if not isinstance(prompt, list):
        return [prompt] * count  # type: ignore[list-item]
    if not listed:
        raise InputError("audio_prompt is a list but there is only one text: pass one prompt, or a list of texts")
    if len(prompt) != count:
        raise InputError(f"audio_prompt has {len(prompt)} entries for {count} texts: give one for each, None for none")
    return prompt


@isolated()
def encode_prompts(
    config: DiaConfig,
    prompts: Sequence[AudioPrompt],
    codec: "Callable[[], Codec]",
    known: dict[bytes, Tensor] | None = None,
) -> list[Tensor | None]:
    """Turn audio prompts into codes; equal sound is encoded once.

    Args:
        config: Of the model.
        prompts: One for each text, or None.
        codec: Called only when there is sound to encode.
        known: Codes by digest of their sound, kept from call to call: those of the last 64 recordings.

    Returns:
        For each prompt `[frames, channels]` int64 codes on the CPU, or None.

    Raises:
        InputError: For a prompt that is none, or that leaves no room to speak.
    """
    known = {} if known is None else known
    return [encode_prompt(config, prompt, codec, known) for prompt in prompts]


def encode_prompt(
    config: DiaConfig, prompt: AudioPrompt, codec: "Callable[[], Codec]", known: dict[bytes, Tensor]
) -> Tensor | None:
    """Turn one audio prompt into codes; arguments, result and errors are those of `encode_prompts`."""
    if prompt is None:
        return None
    channels, codes, max_frames = config.decoder.num_channels, config.decoder.eos_token_id, longest_prompt(config)
    if isinstance(prompt, Voice):
        prompt = prompt.codes
    if _is_codes(prompt):
        return checked_codes(prompt, channels, codes, max_frames)
    if not isinstance(prompt, str | os.PathLike | Audio | tuple):
        raise InputError(f"audio_prompt must be {KINDS}, not {_describe(prompt)}")
    unit = codec()
    longest = max_frames * unit.hop_length / unit.sample_rate
    if isinstance(prompt, str | os.PathLike):
        samples = load_audio(prompt, unit.sample_rate, min_seconds=MIN_SECONDS, max_seconds=longest)
    else:
        if isinstance(prompt, Audio):
            prompt = (prompt.samples, prompt.sample_rate)
        samples = _from_samples(prompt, unit.sample_rate, longest)
    key = hashlib.sha256(samples.tobytes()).digest()
    found = known.get(key)
    if found is None:
        found = checked_codes(unit.encode(samples).cpu(), channels, codes, max_frames)
        while len(known) >= _KEPT:
            known.pop(next(iter(known)), None)
        known[key] = found
    return found


def cut_prompts(prompts: "AudioPrompt | list[AudioPrompt]") -> Any:
    """Cut recordings that are too long for a voice to their best part, with a warning; codes stay as they are.

    Raises InputError for a recording that cannot be read.
    """
    if isinstance(prompts, list):
        return [cut_prompts(prompt) for prompt in prompts]
    if prompts is None or _is_codes(prompts) or isinstance(prompts, str) and not os.path.exists(prompts):
        return prompts  # a name, perhaps: whoever encodes it knows
    if isinstance(prompts, str | os.PathLike):
        whole = Audio(load_audio(prompts, CUT_RATE), CUT_RATE)
    elif isinstance(prompts, Audio):
        whole = prompts
    elif isinstance(prompts, tuple) and len(prompts) == 2:
        whole = Audio(convert(prompts[0], prompts[1], CUT_RATE), CUT_RATE)
    else:
        return prompts  # whose error comes from whoever encodes it
    part, start = best_part(whole)
    if part is not whole:
        told = f"audio_prompt is {whole.duration:.1f} s long and was cut to the seconds from {start:.1f} to"
        warn(f"{told} {start + part.duration:.1f}: prompt_text must hold the words of these alone", AudioWarning)
    return part


def _from_samples(pair: tuple[Any, ...], sample_rate: int, longest: float) -> np.ndarray:
    if len(pair) != 2:
        raise InputError(f"audio_prompt as a tuple must be (samples, sample_rate), not {len(pair)} values")
    samples, rate = pair
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu().float().numpy() if samples.is_floating_point() else samples.cpu().numpy()
    samples = convert(samples, rate, sample_rate)
    seconds = len(samples) / sample_rate
    if not MIN_SECONDS <= seconds <= longest:
        raise InputError(f"audio_prompt is {seconds:.4f} s long; {MIN_SECONDS} to {longest:.2f} s can be used")
    return samples


def _is_codes(prompt: object) -> bool:
    return isinstance(prompt, Tensor | np.ndarray)


@isolated()
def checked_codes(prompt: Any, channels: int, codes: int, max_frames: int) -> Tensor:
    """Codes that a caller passes, `[frames, channels]` int64 on the CPU; the rest as in `encode_prompt`."""
    tensor = tensor_of("audio_prompt", prompt).cpu()
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(
            f"audio_prompt is a {tensor.dtype} array: codes are integers; sound needs its rate: (samples, sample_rate)"
        )
    if tensor.ndim != 2 or tensor.shape[1] != channels:
        raise InputError(f"audio_prompt codes must have shape [frames, {channels}], not {list(tensor.shape)}")
    if not 1 <= len(tensor) <= max_frames:
        raise InputError(
            f"audio_prompt has {len(tensor)} frames; 1 to {max_frames} leave room to speak: use a shorter recording"
        )
    tensor = tensor.long()
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= codes:
        raise InputError(f"audio_prompt holds code {low if low < 0 else high}; codes go from 0 to {codes - 1}")
    return tensor


def _describe(value: object) -> str:
    return f"{type(value).__name__}" + (f" {shown(value)}" if isinstance(value, int | float | bytes) else "")
