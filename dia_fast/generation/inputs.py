"""Check the arguments of `Dia`'s methods and bring them into one form."""

import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from dia_fast.engine import MAX_BATCH, Request
from dia_fast.engine.request import AnyRequest
from dia_fast.errors import InputError, shown
from dia_fast.generation.prompts import AudioPrompt
from dia_fast.generation.sampling_params import (
    AnySamplingParams,
    SamplingOptions,
    SamplingParams,
    named_seed,
    random_seed,
)
from dia_fast.model.config import DecoderConfig, DiaConfig
from dia_fast.model.device import DTYPES
from dia_fast.text.tokenizer import SHORT_SECONDS, encode_text
from dia_fast.utils.ambient import isolated
from dia_fast.utils.progress import StepBar
from dia_fast.utils.values import tensor_of, whole_number

if TYPE_CHECKING:
    from dia_fast.audio.codec import Codec

Texts: TypeAlias = str | bytes | Sequence[str | bytes]
Prompts: TypeAlias = AudioPrompt | list[AudioPrompt]
Seeds: TypeAlias = int | str | Sequence[int | str] | None
Progress: TypeAlias = bool | Callable[[int], None]
AnyCodec: TypeAlias = "str | os.PathLike[str] | Codec | None"
Memory: TypeAlias = int | str | None

FRAMES_PER_SECOND = 44_100 / 512  # of the codec that Dia was trained on

_OPTIONS = (*SamplingOptions.__annotations__, "seed")

_POWERS = ("", "K", "M", "G", "T")  # of 1000, or of 1024 as in KiB


def check_codec(codec: object) -> None:
    """Raise InputError unless it is the name or path of a codec, a loaded one, or None."""
    if codec is None or isinstance(codec, str | os.PathLike):
        return
    from dia_fast.audio.codec import Codec

    if not isinstance(codec, Codec):
        raise InputError(f"codec must be the name or path of one, a loaded Codec, or None, not {shown(codec)}")


def choose_codec_dtype(dtype: torch.dtype | str | None, codec: object, device: torch.device) -> torch.dtype:
    """Resolve the `codec_dtype` of `Dia`; None is that of a loaded codec, or float32.

    Raises:
        InputError: For one that is not offered, that is not the loaded codec's, or that the device cannot compute in.
    """
    loaded = None if codec is None or isinstance(codec, str | os.PathLike) else getattr(codec, "dtype", None)
    if dtype is None:
        return loaded or torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.float16):
        raise InputError(
            f"codec_dtype {shown(dtype)} is not supported; use float32 or float16 (fp32, fp16). bfloat16 would lose 20 "
            "dB of the sound"
        )
    if loaded is not None and loaded != chosen:
        raise InputError(f"codec_dtype is {chosen}, and the codec was loaded in {loaded}: load it in the one you want")
    if chosen == torch.float16:
        if str(codec).startswith("descript"):
            raise InputError("codec_dtype: the dac package's own codec computes in float32 alone; name another codec")
        _try_convolutions(chosen, device)
    return chosen


def _try_convolutions(dtype: torch.dtype, device: torch.device) -> None:
    """Raise InputError where torch has no convolutions in a dtype, as on CPUs before torch 2.3."""
    x = torch.zeros(1, 2, 8, dtype=dtype, device=device)
    weight = torch.zeros(2, 2, 3, dtype=dtype, device=device)
    try:
        functional.conv1d(x, weight)
        functional.conv_transpose1d(x, weight, stride=2)
    except RuntimeError as error:
        raise InputError(
            f"codec_dtype: torch {torch.__version__} cannot convolve in {dtype} on {device.type} ({error}); use fp32"
        ) from error


def is_list(text: Texts) -> bool:
    return isinstance(text, list | tuple)


def texts_of(text: Texts) -> list[str | bytes]:
    """One text or several, as a list.

    Raises:
        InputError: For an empty one.
    """
    if not is_list(text):
        return [text]  # type: ignore[list-item]
    if not text:
        raise InputError("text is an empty list: there is nothing to say")
    return list(text)  # type: ignore[arg-type]


def one_text(text: str | bytes) -> str | bytes:
    """Raise InputError for a list of texts."""
    if is_list(text):
        raise InputError("text is a list, and a stream speaks one text: start one for each, in threads or with astream")
    return text


def seeds_of(seed: Seeds, count: int, params: SamplingParams) -> list[int]:
    """A checked seed for each text.

    Args:
        params: With the one that holds if none is given.
    """
    seed = params.seed if seed is None else seed
    if seed is None:
        return [random_seed() for _ in range(count)]
    given: list[Any] = list(seed) if isinstance(seed, list | tuple) else [seed] * count
    if len(given) != count:
        raise InputError(f"seed has {len(given)} entries for {count} texts: give one for each, or one int for all")
    given = [random_seed() if item is None else named_seed(item) if isinstance(item, str) else item for item in given]
    checked = (replace(params, seed=item).seed for item in given)
    return [item for item in checked if item is not None]


def least_seconds(config: DiaConfig) -> float:
    """Below which it sounds unnatural. The advice is about Dia-1.6B; models of fewer positions learnt shorter texts."""
    return SHORT_SECONDS if config.decoder.max_position_embeddings >= DecoderConfig.max_position_embeddings else 0.0


def progress_of(progress: Progress, total: int, frames_per_second: float = FRAMES_PER_SECOND) -> Any:
    """A context whose value is what to call with the number of steps so far, or None.

    Args:
        total: Steps expected.
    """
    if callable(progress):
        return nullcontext(progress)
    if not isinstance(progress, bool):
        raise InputError(f"progress must be True, False or a function of the number of steps, not {progress!r}")
    return StepBar(total, frames_per_second) if progress else nullcontext(None)


def expected_steps(config: DiaConfig, seconds: float, limit: int, frames_per_second: float = FRAMES_PER_SECOND) -> int:
    """Steps that some seconds of speech take; no more than `limit` allows."""
    most = min(limit, config.decoder.max_position_embeddings)
    # The delay pattern adds rows; one step more than rows, since the last one only puts the last row in its place.
    return max(1, min(math.ceil(seconds * frames_per_second) + max(config.delay_pattern), most)) + 1


def params_for(
    config: DiaConfig, defaults: SamplingParams, given: SamplingParams | None = None, **options: Any
) -> SamplingParams:
    """Checked parameters that leave room for a frame of sound.

    Args:
        given: Parameters in the place of the defaults.
        options: Single ones, in the place of either.

    Raises:
        InputError: For a value that cannot be used.
        TypeError: For a name that is no setting.
    """
    if given is not None and not isinstance(given, SamplingParams):
        raise InputError(f"sampling_params must be a SamplingParams, not {shown(given)}")
    for name in options:
        if name not in _OPTIONS:
            close = difflib.get_close_matches(name, _OPTIONS, 1)
            hint = f"; did you mean {close[0]}?" if close else f": they are {', '.join(_OPTIONS)}"
            raise TypeError(f"{name!r} is no setting of sampling{hint}")
    params = (given or defaults).given(**options)
    least = max(config.delay_pattern) + 2
    if params.max_new_tokens < least:
        raise InputError(
            f"max_new_tokens must be at least {least}, not {params.max_new_tokens}: the delay pattern completes "
            "the first frame of sound no earlier"
        )
    return params


def ids_of(config: DiaConfig, text: str | bytes) -> list[int]:
    """A checked text as the encoder reads it."""
    encoder = config.encoder
    ids = encode_text(text, max_length=encoder.max_position_embeddings)
    if max(ids) >= encoder.vocab_size:
        raise InputError(f"text holds byte {max(ids)}, but the model knows only {encoder.vocab_size}")
    return ids


def make_request(ids: list[int], seed: int | None, prompt: Tensor | None, params: SamplingParams) -> Request:
    """A request with these parameters, whatever their seed; one without bounds for `AnySamplingParams`."""
    kind = AnyRequest if isinstance(params, AnySamplingParams) else Request
    return kind(
        ids,
        prompt,
        max_new_tokens=params.max_new_tokens,
        guidance_scale=params.guidance_scale,
        temperature=0.0 if params.greedy else params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=seed,
    )


@isolated()
def checked_delayed_codes(config: DiaConfig, delayed_codes: Any, count: int) -> Tensor:
    """Delayed codes of each of `count` texts, `[count, steps, channels]` integers."""
    decoder = config.decoder
    codes = tensor_of("delayed_codes", delayed_codes)
    wanted = f"[{count}, steps, {decoder.num_channels}]"
    if codes.ndim != 3 or codes.shape[0] != count or codes.shape[2] != decoder.num_channels:
        raise InputError(f"delayed_codes must have shape {wanted}, not {list(codes.shape)}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InputError(f"delayed_codes must be integers, not {codes.dtype}")
    if not 1 <= codes.shape[1] <= decoder.max_position_embeddings:
        raise InputError(f"delayed_codes must have 1 to {decoder.max_position_embeddings} steps, not {codes.shape[1]}")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= decoder.vocab_size:
        raise InputError(
            f"delayed_codes hold code {low if low < 0 else high}; codes go from 0 to {decoder.vocab_size - 1}"
        )
    return codes


def cut_remark(config: DiaConfig, limit: int, given: int) -> str:
    """The remark about speech that reached its limit: `max_new_tokens`, or the positions that the prompt leaves.

    Args:
        given: Frames of the prompt.
    """
    left = config.decoder.max_position_embeddings - given
    cause = "max_new_tokens" if limit <= left else "the model's positions"
    return f"speech was cut after {min(limit, left)} steps, by {cause}"


def engine_limits(max_batch: int, memory: Memory) -> dict[str, Any]:
    """Checked arguments of an `Engine`: memory in bytes, from a number of them or a text such as "4GB" or "512 MiB"."""
    return {"max_batch": whole_number("max_batch", max_batch, 1, MAX_BATCH), "memory": _bytes(memory)}


def _bytes(memory: Memory) -> int | None:
    if memory is None:
        return None
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", memory.upper())
        if found and (found[2] or not found[3]):
            memory = int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS.index(found[2]))
    try:
        return whole_number("memory", memory, 1)
    except InputError:
        raise InputError(
            f'memory must be a number of bytes, or a text such as "4GB" or "512MB", not {shown(memory)}'
        ) from None
