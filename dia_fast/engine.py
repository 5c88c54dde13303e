"""From requests to codes: prefill, the decode loop, and the end of it.

The loop counts rows on the host and never waits for the device inside a step; that a request has finished is read from
a flag that travels back by itself (`_FinishWatch`), a few steps late at most. A finished slot is inert meanwhile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast.config import DiaConfig
from dia_fast.delay import delayed_rows, undo_delay
from dia_fast.errors import InputError
from dia_fast.model import DiaModel
from dia_fast.settings import SamplingSettings, random_seed
from dia_fast.state import DecodeState, Sizes, cross_pages, self_pages

Progress = Callable[[int], None]

POLL_EVERY = 8  # steps between two looks at the finished flags of a GPU


@dataclass(frozen=True)
class Request:
    """One text to speak.

    text_ids: bytes of the text, see `dia_fast.text`; prompt: `[frames, channels]` integer codes to go on from, or None;
    max_new_tokens: most rows to generate, the `max(delay)` that complete the last frames included;
    temperature: 0 takes the likeliest code; seed: None draws one. The rest as in `SamplingSettings`.
    Raises InputError for settings that cannot work.
    """

    text_ids: Sequence[int]
    prompt: Tensor | None = None
    max_new_tokens: int = 3072
    guidance_scale: float | None = 3.0
    temperature: float = 1.2
    top_k: int | None = 45
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        self.settings  # noqa: B018 - checks them

    @property
    def settings(self) -> SamplingSettings:
        return SamplingSettings(
            max_new_tokens=self.max_new_tokens,
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Generation:
    """What became of a request.

    frames: `[frames, channels]` int64, the new ones only, every code a sound; rows: `[rows, channels]` int32, the whole
    delayed grid from row 0, special codes and prompt included; seed: the one used; truncated: the length limit ended
    it, not the model.
    """

    frames: Tensor
    rows: Tensor
    seed: int
    truncated: bool


@dataclass(frozen=True)
class _Plan:
    """A checked request in terms of rows: `grid` is what the prompt determines, `first` the row decoding starts at."""

    request: Request
    grid: Tensor
    first: int
    end: int
    seed: int


@torch.inference_mode()
def generate(model: DiaModel, requests: Sequence[Request], *, progress: Progress | None = None) -> list[Generation]:
    """Speaks all requests as one batch, in lockstep.

    progress: called after every step with the number of rows sampled since the start. A request whose prompt and
    `max_new_tokens` together exceed the model's positions is cut there. Raises InputError, before any work, for a text
    or a prompt that the model cannot take.
    """
    plans = [plan(model.config, request) for request in requests]
    if not plans:
        return []
    state = DecodeState(model.config, model.ops, _sizes(model.config, plans), model.dtype, model.device)
    for slot, item in enumerate(plans):
        admit(model, state, slot, item)
    watch = _FinishWatch(state.finished)
    for step in range(max(item.end - item.first for item in plans) + 1):
        for slot, item in enumerate(plans):
            state.grow(slot, min(item.first + step, item.end) + 1)
        model.decode_step(state)
        if progress is not None:
            progress(step + 1)
        if watch.all_finished():
            break
    return [collect(model.config, state, slot, item) for slot, item in enumerate(plans)]


def plan(config: DiaConfig, request: Request) -> _Plan:
    """Checks text and prompt against the model's sizes. Raises InputError."""
    decoder, encoder = config.decoder, config.encoder
    if not 0 < len(request.text_ids) <= encoder.max_position_embeddings:
        raise InputError(
            f"text_ids holds {len(request.text_ids)} ids; from 1 to {encoder.max_position_embeddings} can be encoded"
        )
    if not all(0 <= item < encoder.vocab_size for item in request.text_ids):
        raise InputError(f"text_ids must be from 0 to {encoder.vocab_size - 1}, got {list(request.text_ids)[:20]}")
    prompt = request.prompt
    if prompt is None:
        prompt = torch.empty(0, decoder.num_channels, dtype=torch.int32)
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
    seed = random_seed() if request.seed is None else request.seed
    grid = delayed_rows(prompt.cpu(), config.delay_pattern, decoder.bos_token_id)
    return _Plan(request, grid, frames, min(frames + request.max_new_tokens, limit), seed)


def admit(model: DiaModel, state: DecodeState, slot: int, item: _Plan) -> None:
    """Puts a request into a slot: settings, text, and the keys and values of its prompt. Raises OutOfPages."""
    settings, length = item.request.settings, len(item.request.text_ids)
    state.cross_blocks.grow(slot, length)
    state.grow(slot, item.first + 1)
    model.store_text(item.request.text_ids, state.cross_pool, state.cross_blocks.slots(slot, length))
    state.text_lengths[slot] = length
    state.seed[slot] = item.seed
    state.guidance_scale[slot] = settings.guidance_scale or 1.0
    state.temperature[slot] = 0.0 if settings.greedy else settings.temperature
    state.top_k[slot] = settings.top_k or 0
    state.top_p[slot] = settings.top_p
    known = item.grid.to(model.device)
    state.codes[slot, : item.first] = known[: item.first]
    state.forced[slot] = known[item.first :]
    if item.first:
        model.prefill(known[: item.first], state, slot)
    state.first_row[slot], state.end_row[slot] = item.first, item.end
    state.eos_row[slot], state.finished[slot] = -1, 0
    state.row[slot] = item.first


def collect(config: DiaConfig, state: DecodeState, slot: int, item: _Plan) -> Generation:
    """What a slot has produced so far. Waits for the device."""
    delay, eos = config.delay_pattern, config.decoder.eos_token_id
    rows = state.codes[slot, : int(state.row[slot])].cpu()
    ended = int(state.eos_row[slot])
    truncated = ended < 0 or ended + max(delay) >= item.end
    return Generation(undo_delay(rows, delay, eos)[item.first :], rows, item.seed, truncated)


def _sizes(config: DiaConfig, plans: Sequence[_Plan]) -> Sizes:
    """Room for every request at its longest."""
    guided = any(item.request.settings.guided for item in plans)
    branches = 2 if guided else 1
    texts = [len(item.request.text_ids) for item in plans]
    return Sizes(
        batch=len(plans),
        guided=guided,
        rows=max(item.end for item in plans) + 1,
        text=max(texts),
        pages=branches * sum(self_pages(config).pages(item.end + 1) for item in plans),
        text_pages=sum(cross_pages(config).pages(length) for length in texts),
    )


class _FinishWatch:
    """Learns whether all slots have finished without making the host wait for the device."""

    def __init__(self, finished: Tensor) -> None:
        self.finished = finished
        self.steps = 0
        self.on_gpu = finished.device.type == "cuda"
        if self.on_gpu:
            self.copy = torch.zeros_like(finished, device="cpu").pin_memory()
            self.arrived: torch.cuda.Event | None = None

    def all_finished(self) -> bool:
        """Call it after each step."""
        if not self.on_gpu:
            return bool(self.finished.all())
        self.steps += 1
        if self.arrived is None and self.steps % POLL_EVERY == 0:
            self.copy.copy_(self.finished, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        if self.arrived is not None and self.arrived.query():
            self.arrived = None
            return bool(self.copy.all())
        return False
