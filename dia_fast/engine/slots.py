"""Requests in and out of the slots of a `DecodeState`: placing, moving up, parking, collecting."""

from collections.abc import Iterator

from torch import Tensor

from dia_fast.config import DiaConfig
from dia_fast.delay import undo_delay
from dia_fast.engine.request import Generation, Plan
from dia_fast.engine.run import Parked
from dia_fast.errors import NumericError
from dia_fast.model import DiaModel
from dia_fast.state import DecodeState
from dia_kernels.reference.sampling import NOT_FINITE

CHUNK = 128
"""Rows of an audio prompt that are computed at once. Fixed, and counted from row 0: where a prompt is cut decides the
last bits of its values, so that must not depend on what else is running."""


def prefill(model: DiaModel, state: DecodeState, lane: int, item: Plan) -> Iterator[int]:
    """Fills a lane with the text and the prompt of a request, piece by piece; yields the cost of each, in rows.

    The pages must be there.
    """
    ids = item.request.text_ids
    model.store_text(ids, state.cross_pool, state.cross_blocks.slots(lane, len(ids)))
    yield len(ids)
    known = item.grid[: item.first].to(model.device)
    for begin in range(0, item.first, CHUNK):
        rows = known[begin : begin + CHUNK]
        model.prefill(rows, state, lane, len(ids), guided=item.guided, first=begin)
        yield len(rows) * (2 if item.guided else 1)


def place(state: DecodeState, slot: int, item: Plan) -> None:
    """Sets a slot to the first step of a request whose lane is filled."""
    settings = item.request.settings
    state.text_lengths[slot] = len(item.request.text_ids)
    state.seed[slot] = item.seed - 2**64 if item.seed >= 2**63 else item.seed  # the same 64 bits
    state.guidance_scale[slot] = settings.guidance_scale or 1.0
    state.temperature[slot] = 0.0 if settings.greedy else settings.temperature
    state.top_k[slot] = settings.top_k or 0
    state.top_p[slot] = settings.top_p
    known = item.grid.to(state.codes.device)
    state.codes[slot, : item.first] = known[: item.first]
    state.forced[slot] = known[item.first :]
    state.first_row[slot], state.end_row[slot] = item.first, item.end
    state.eos_row[slot], state.finished[slot], state.status[slot] = -1, 0, 0
    state.row[slot] = item.first


def collect(config: DiaConfig, state: DecodeState, slot: int, item: Plan) -> Generation:
    """What a slot has produced so far. Waits for the device."""
    delay, eos = config.delay_pattern, config.decoder.eos_token_id
    rows = state.codes[slot, : int(state.row[slot])].clone().cpu()
    ended = int(state.eos_row[slot])
    truncated = ended < 0 or ended + max(delay) >= item.end
    return Generation(undo_delay(rows, delay, eos)[item.first :], rows, item.seed, truncated)


def failure(config: DiaConfig, state: DecodeState, slot: int, status: Tensor, item: Plan) -> NumericError | None:
    """The error that a slot's status, `[channels]`, amounts to, or None if no code was chosen by it. Waits.

    Once its channel's speech has ended, or all rows are there, a sampled code is not used. Several channels mostly fail
    at once; the earliest row is told, there the lowest channel.
    """
    eos_row, delay = int(state.eos_row[slot]), config.delay_pattern
    words = [(word >> 2, channel, word & 3) for channel, word in enumerate(status.tolist()) if word]
    used = [
        (row, channel, kind)
        for row, channel, kind in words
        if row <= item.end and (eos_row < 0 or row < eos_row + delay[channel])
    ]
    if not used:
        return None
    row, channel, kind = min(used)
    where = f"step {row - item.first} (row {row}, channel {channel})"
    if kind == NOT_FINITE:
        return NumericError(
            f"the logits of {where} are NaN or infinity. The weights may be damaged: get the checkpoint again. In "
            "float16 values may have grown too large: use bfloat16 or float32"
        )
    return NumericError(
        f"no code is left to draw at {where}: the {item.request.top_k} best guided codes are all ones that cannot be "
        "spoken. Give a larger top_k, or none"
    )


def park(state: DecodeState, slot: int, lane: int, guided: bool) -> Parked:
    """Copies a slot and its lane's self-attention pages to the host, and gives those pages back."""
    owners = state.owners(lane, guided)
    places = [state.blocks.pages(owner).to(state.table.device) for owner in owners]
    layers = zip(state.pool.keys, state.pool.values, strict=True)
    pages = [[(keys[place].cpu(), values[place].cpu()) for place in places] for keys, values in layers]
    saved = state.save(slot)
    state.release_grid(lane)
    return Parked(saved, pages)


def unpark(state: DecodeState, slot: int, lane: int, guided: bool, parked: Parked) -> None:
    """Puts back what `park` took, into any slot and any pages. Raises OutOfPages, with nothing taken."""
    held = parked.pages[0][0][0].shape[0]
    state.grow(lane, held * state.pool.shape.page_size, guided)
    for owner, index in zip(state.owners(lane, guided), range(2), strict=False):
        place = state.blocks.pages(owner).to(state.table.device)
        for keys, values, layer in zip(state.pool.keys, state.pool.values, parked.pages, strict=True):
            keys[place], values[place] = (tensor.to(keys.device) for tensor in layer[index])
    state.load(slot, parked.slot)
