"""What a caller may pass as the voice to speak in, turned into codes.

An audio prompt is a path, an `Audio`, a pair `(samples, sample_rate)`, or the codes themselves as an integer tensor
`[frames, channels]`. Everything but codes goes through the codec.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dia_fast.audio.audio import Audio, convert, load_audio
from dia_fast.errors import InputError, shown
from dia_fast.model.config import DiaConfig
from dia_fast.utils.ambient import isolated
from dia_fast.utils.values import tensor_of

if TYPE_CHECKING:
    from dia_fast.audio.codec import Codec

AudioPrompt: TypeAlias = str | os.PathLike[str] | Audio | tuple[Any, int] | Tensor | np.ndarray | None

KINDS = "a path, an Audio, a pair (samples, sample_rate) or an integer tensor of codes [frames, channels]"
MIN_SECONDS = 0.02  # two frames of the codec


def prompt_for_each(prompt: "AudioPrompt | Sequence[AudioPrompt]", count: int, listed: bool) -> list[AudioPrompt]:
    """One prompt, or None, for each of `count` texts. A list gives each text its own; anything else is for all of them.

    listed: whether the caller passed a list of texts; only then may the prompts be a list.
    Raises InputError for a list beside a single text or of another length.
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
    config: DiaConfig, prompts: Sequence[AudioPrompt], codec: "Callable[[], Codec]"
) -> list[Tensor | None]:
    """The codes of each prompt, as `encode_prompt` gives them; one that serves several texts is encoded once."""
    decoder = config.decoder
    # Positions must be left for one new frame and the rows that complete it.
    room = decoder.max_position_embeddings - max(config.delay_pattern) - 2
    codes = {
        key: encode_prompt(prompt, codec, channels=decoder.num_channels, codes=decoder.eos_token_id, max_frames=room)
        for key, prompt in {id(prompt): prompt for prompt in prompts}.items()
    }
    return [codes[id(prompt)] for prompt in prompts]


def encode_prompt(
    prompt: AudioPrompt, codec: "Callable[[], Codec]", *, channels: int, codes: int, max_frames: int
) -> Tensor | None:
    """The codes of one prompt, `[frames, channels]` int64 on the CPU, or None for None.

    codec: called only when there is sound to encode. codes: valid ones are 0 to `codes - 1`. max_frames: the longest
    prompt that leaves room to speak. Raises InputError naming what is wrong.
    """
    if prompt is None:
        return None
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
    return checked_codes(unit.encode(samples).cpu(), channels, codes, max_frames)


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
