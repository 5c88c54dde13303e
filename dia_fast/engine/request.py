"""What is asked of the engine, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast.errors import InputError, shown
from dia_fast.generation.sampling_params import SamplingParams, random_seed
from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import FREE, delayed_rows
from dia_fast.utils.values import tensor_of


@dataclass(frozen=True)
class Request:
    """One text to speak.

    text_ids: bytes of the text; prompt: `[frames, channels]` integer codes to go on from, or None;
    grid: instead of a prompt, the beginning of the delayed grid itself, `[rows, channels]` integer codes from row 0 on,
    special ones too, and -1 where the model chooses: never in row 0, and always in channel 0 after the first choice;
    max_new_tokens: most rows to generate, the `max(delay)` that complete the last frames included;
    temperature: 0 takes the likeliest code; seed: None draws one. The rest as in `SamplingParams`.
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
    grid: Tensor | None = None

    def __post_init__(self) -> None:
        self.settings  # noqa: B018 - checks them
        for name in ("prompt", "grid"):
            codes = getattr(self, name)
            if codes is not None and (not isinstance(codes, Tensor) or codes.dtype == torch.bool or codes.is_complex()):
                raise InputError(f"{name} must be an integer tensor, not {shown(codes)}")
            if codes is not None:
                tensor_of(name, codes)
        if not isinstance(self.text_ids, Sequence) or not all(type(item) is int for item in self.text_ids):
            raise InputError(f"text_ids must be a sequence of integers, not {shown(self.text_ids)}")

    @property
    def settings(self) -> SamplingParams:
        return SamplingParams(
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
class Plan:
    """A checked request in terms of rows: `grid` is what the prompt determines, `first` the row decoding starts at.

    The last row is `end`: the grid never has more than `end + 1` rows.
    """

    request: Request
    grid: Tensor
    first: int
    end: int
    seed: int

    @property
    def guided(self) -> bool:
        return self.request.settings.guided


def plan(config: DiaConfig, request: Request) -> Plan:
    """Checks text and prompt against the model's sizes. Raises InputError."""
    decoder, encoder = config.decoder, config.encoder
    if not 0 < len(request.text_ids) <= encoder.max_position_embeddings:
        raise InputError(
            f"text_ids holds {len(request.text_ids)} ids; from 1 to {encoder.max_position_embeddings} can be encoded"
        )
    if not all(0 <= item < encoder.vocab_size for item in request.text_ids):
        raise InputError(f"text_ids must be from 0 to {encoder.vocab_size - 1}, got {list(request.text_ids)[:20]}")
    seed = random_seed() if request.seed is None else request.seed
    if request.grid is not None:
        grid, first = _given_grid(config, request)
        return Plan(request, grid, first, min(first + request.max_new_tokens, decoder.max_position_embeddings), seed)
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
    grid = delayed_rows(prompt.cpu(), config.delay_pattern, decoder.bos_token_id)
    return Plan(request, grid, frames, min(frames + request.max_new_tokens, limit), seed)


def _given_grid(config: DiaConfig, request: Request) -> tuple[Tensor, int]:
    """A request's grid, `[first + max(delay) + 1, channels]` int32, and the last row that is complete."""
    decoder, grid = config.decoder, request.grid
    assert grid is not None
    if request.prompt is not None:
        raise InputError("grid: give a prompt or a grid, not both")
    if grid.ndim != 2 or grid.shape[1] != decoder.num_channels or grid.is_floating_point() or not len(grid):
        raise InputError(
            f"grid must be integer codes of shape [rows, {decoder.num_channels}] with a first row, got {grid.dtype} of "
            f"shape {list(grid.shape)}"
        )
    low, high = int(grid.min()), int(grid.max())
    if low < FREE or high >= decoder.vocab_size:
        raise InputError(f"grid: codes must be from 0 to {decoder.vocab_size - 1}, or -1, got {low} to {high}")
    grid = grid.to("cpu", torch.int32)
    complete = (grid != FREE).all(1).long().cumprod(0)
    first = int(complete.sum()) - 1
    room = first + max(config.delay_pattern) + 1
    if first < 0 or (grid[first + 1 :, 0] != FREE).any() or (grid[room:] != FREE).any():
        raise InputError(
            f"grid: after its complete rows, of which there must be one, channel 0 must be -1, and everything after "
            f"{max(config.delay_pattern)} more rows"
        )
    if first >= decoder.max_position_embeddings:
        raise InputError(f"grid has {first + 1} complete rows and the model only {decoder.max_position_embeddings}")
    whole = torch.full((room, decoder.num_channels), FREE, dtype=torch.int32, device="cpu")
    whole[: len(grid)] = grid[:room]
    return whole, first
