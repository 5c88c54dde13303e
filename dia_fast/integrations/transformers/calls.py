"""One call of `generate`, from what transformers has prepared to requests for the engine, and back to its tensors."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import (
    DiaClassifierFreeGuidanceLogitsProcessor,
    DiaEOSChannelFilterLogitsProcessor,
    DiaEOSDelayPatternLogitsProcessor,
)

from dia_fast.engine import Generation, Request
from dia_fast.errors import InputError
from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import FREE


class NotOurs(Exception):
    """The engine cannot serve this call; the message names the argument that asks for it."""


@dataclass(frozen=True)
class CallParams:
    """Sampling parameters read from transformers' processors and criteria."""

    max_length: int
    guidance_scale: float | None
    temperature: float
    top_k: int | None
    top_p: float


def read_params(
    processors: Iterable[Any], criteria: Iterable[Any], generation: GenerationConfig, config: DiaConfig
) -> CallParams:
    """CallParams from transformers' own objects, which hold what `generate` made of all its arguments.

    Raises:
        NotOurs: For a processor or a criterion that the engine has no counterpart of.
    """
    found = {type(item): item for item in processors}
    tokens, decoder = _tokens(criteria, generation), config.decoder
    guidance = found.pop(DiaClassifierFreeGuidanceLogitsProcessor, None)
    temperature = found.pop(TemperatureLogitsWarper, None)
    top_k, top_p = found.pop(TopKLogitsWarper, None), found.pop(TopPLogitsWarper, None)
    channels, delays = (
        found.pop(kind, None) for kind in (DiaEOSChannelFilterLogitsProcessor, DiaEOSDelayPatternLogitsProcessor)
    )
    if found:
        raise NotOurs(_named(next(iter(found)), generation))
    if channels is None or delays is None or channels.eos_id != decoder.eos_token_id:
        raise NotOurs("eos_token_id")
    if tokens["eos"] != [decoder.eos_token_id] or tokens["pad"] != [decoder.pad_token_id]:
        raise NotOurs("eos_token_id or pad_token_id, which differ from the model's own")
    if delays.delay_pattern.flatten().tolist() != list(config.delay_pattern):
        raise NotOurs("delay_pattern")
    kept = None if top_k is None else top_k.top_k
    if guidance is not None:
        if top_k is not None and top_k.top_k != guidance.guidance_top_k:
            raise NotOurs("top_k")
        kept = guidance.guidance_top_k
        if kept is not None and kept > decoder.vocab_size:
            raise NotOurs(f"top_k, which is more than the vocabulary's {decoder.vocab_size}")
    return CallParams(
        max_length=tokens["max_length"],
        guidance_scale=None if guidance is None else guidance.guidance_scale,
        temperature=0.0 if not generation.do_sample else 1.0 if temperature is None else temperature.temperature,
        top_k=kept,
        top_p=1.0 if top_p is None else top_p.top_p,
    )


def _tokens(criteria: Iterable[Any], generation: GenerationConfig) -> dict[str, Any]:
    """The length limit, and the tokens that end a sequence and follow its end."""
    found = {type(item): item for item in criteria}
    length, end = found.pop(MaxLengthCriteria, None), found.pop(EosTokenCriteria, None)
    if found:
        raise NotOurs(_named(next(iter(found)), generation))
    if length is None or end is None:
        raise NotOurs("max_length" if length is None else "eos_token_id")
    pad = getattr(generation, "_pad_token_tensor", None)
    return {
        "max_length": int(length.max_length),
        "eos": end.eos_token_id.flatten().tolist(),
        "pad": [] if pad is None else pad.flatten().tolist(),
    }


def _named(kind: type, generation: GenerationConfig) -> str:
    """The setting that asks for a processor or criterion of this kind: the kind is named after it, more or less."""
    stem = re.sub(r"(Logits(Processor|Warper)|Criteria)$", "", kind.__name__).lower()
    for name in vars(generation):
        plain = name.replace("_", "")
        if plain.startswith(stem) or (len(plain) > 5 and stem.startswith(plain)):
            return f"{name} (a {kind.__name__})"
    return f"a {kind.__name__}"


def read_texts(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The texts of a padded batch `[batch, length]`, on either side.

    Raises:
        NotOurs: For a mask with holes.
    """
    if mask is None:
        return ids.tolist()
    texts = []
    for row, keep in zip(ids.tolist(), (mask != 0).tolist(), strict=True):
        length = sum(keep)
        first = keep.index(True) if length else 0
        if not length or not all(keep[first : first + length]):
            raise NotOurs("attention_mask, which masks out a whole text or parts inside it")
        texts.append(row[first : first + length])
    return texts


def read_delayed_codes(rows: Tensor, mask: Tensor, known: int, config: DiaConfig) -> tuple[list[Tensor], list[int]]:
    """(what is given of each delayed grid, FREE where the model chooses; padding rows before each).

    Args:
        rows: `[batch, n, channels]`, the pad code where the model chooses.
        mask: `[batch, known]`.
        known: Rows that decoding starts after.

    Raises:
        NotOurs: For a grid that the engine cannot start from.
    """
    rows, pads = rows.cpu(), []
    for keep in (mask != 0).tolist():
        late = known - sum(keep)
        if late == known or not all(keep[late:]):
            raise NotOurs("decoder_attention_mask, which masks more than padding on the left")
        pads.append(late)
    limit = known + max(config.delay_pattern)
    free = rows == config.decoder.pad_token_id
    # Given codes beyond the first rows come from the delay pattern; the engine holds as many rows of them as that has.
    if free[:, known:, 0].logical_not().any() or free[:, limit:].logical_not().any():
        raise NotOurs("decoder_input_ids, which give codes beyond the rows that are complete")
    given = rows.masked_fill(free, FREE)
    given[:, :known] = rows[:, :known]
    return [codes[late:limit].to(torch.int32) for codes, late in zip(given, pads, strict=True)], pads


def make_requests(
    texts: Sequence[Sequence[int]],
    delayed_codes: Sequence[Tensor],
    params: CallParams,
    known: int,
    seeds: Sequence[int | None],
) -> list[Request]:
    """A request for each text.

    Raises:
        NotOurs: For parameters outside the engine's range.
    """
    try:
        return [
            Request(
                ids,
                delayed_codes=codes,
                max_new_tokens=params.max_length - known,
                guidance_scale=params.guidance_scale,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                seed=seed,
            )
            for ids, codes, seed in zip(texts, delayed_codes, seeds, strict=True)
        ]
    except InputError as error:
        raise NotOurs(str(error)) from error


def assemble(
    start: Tensor, spoken: Sequence[Generation], pads: Sequence[int], params: CallParams, config: DiaConfig
) -> Tensor:
    """Assemble the result of transformers' sampling loop: `[batch * channels, rows]` int64 on the device of `start`.

    Args:
        start: `[batch * channels, known]`, the rows before decoding.
    """
    channels = config.decoder.num_channels
    ends = [late + len(item.delayed_codes) for late, item in zip(pads, spoken, strict=True)]
    total = min(max(ends), params.max_length)
    codes = torch.full((len(spoken), total, channels), config.decoder.pad_token_id, dtype=torch.int64, device="cpu")
    for row, late, item in zip(codes, pads, spoken, strict=True):
        row[late : late + len(item.delayed_codes)] = item.delayed_codes[: total - late]
    flat = codes.transpose(1, 2).reshape(-1, total).to(start)
    flat[:, : start.shape[1]] = start
    return flat
