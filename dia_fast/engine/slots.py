"""Sequences in and out of the slots of a `DecodeState`: prefill, placing, swapping out and in, results."""

from collections.abc import Callable, Generator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dia_fast.engine.request import Generation, Plan
from dia_fast.engine.sequence import Swapped
from dia_fast.errors import NumericError
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState
from dia_fast.model.delay import undo_delay
from dia_fast.model.model import DiaModel
from dia_kernels.reference.sampling import NOT_FINITE

CHUNK = 128
"""Rows of an audio prompt that are computed at once. Fixed, and counted from row 0: where a prompt is cut decides the
last bits of its values, so that must not depend on what else is running."""

Upload = Callable[[Tensor], Tensor]


def prefill(
    model: DiaModel, state: DecodeState, lane: int, item: Plan, upload: Upload | None = None
) -> Generator[int, None, Tensor]:
    """Fill a lane with the text and the prompt of a request, piece by piece; yield the cost of each, in rows.

    The pages must be there; their rows in the block tables are written here. All that the device has to know of a
    newcomer goes there in one upload. Returns its delayed codes on the device, for `place`.

    Args:
        upload: Sends host values to the device.
    """
    ids, count = item.request.text_ids, len(item.request.text_ids)
    tables = [(state.cross_blocks, lane)]
    tables += [(state.blocks, owner) for owner in state.owners(lane, item.guided)]
    parts = [torch.tensor(ids, dtype=torch.int32, device="cpu"), item.grid.flatten().to(torch.int32)]
    parts += [blocks.pages(owner).to(torch.int32) for blocks, owner in tables]
    send = upload or (lambda values: values.to(model.device))
    text, codes, *pages = send(torch.cat(parts)).split([len(part) for part in parts])
    for (blocks, owner), row in zip(tables, pages, strict=True):
        blocks.write_row(owner, row)
    if state.sizes.guided and not item.guided:
        state.write_spare(lane)
    model.store_text(text.to(torch.int64), state.cross_pool, state.cross_blocks.slots(lane, count))
    yield count
    codes = codes.view(item.grid.shape)
    for begin in range(0, item.first, CHUNK):
        rows = codes[begin : min(begin + CHUNK, item.first)]
        model.prefill(rows, state, lane, count, guided=item.guided, first=begin)
        yield len(rows) * (2 if item.guided else 1)
    return codes


def place(state: DecodeState, slot: int, item: Plan, codes: Tensor | None = None) -> None:
    """Set a slot to the first step of a request whose lane is filled. codes: what `prefill` returned."""
    settings = item.request.settings
    if codes is None:
        codes = item.grid.to(state.codes.device)
    state.codes[slot, : item.first] = codes[: item.first]
    state.forced[slot] = codes[item.first :]
    state.text_lengths[slot] = len(item.request.text_ids)
    state.seed[slot] = item.seed - 2**64 if item.seed >= 2**63 else item.seed  # the same 64 bits
    state.guidance_scale[slot] = settings.guidance_scale or 1.0
    state.temperature[slot] = 0.0 if settings.greedy else settings.temperature
    state.top_k[slot] = settings.top_k or 0
    state.top_p[slot] = settings.top_p
    state.first_row[slot], state.end_row[slot] = item.first, item.end
    state.eos_row[slot], state.finished[slot], state.status[slot] = -1, 0, 0
    state.row[slot] = item.first


def collect(config: DiaConfig, rows: NDArray[np.int32], eos_row: int, item: Plan) -> Generation:
    """The result of a request, from its delayed codes, `[rows, channels]`. eos_row: where speech ends, or below 0."""
    delay = config.delay_pattern
    codes = torch.from_numpy(rows.copy())
    truncated = eos_row < 0 or eos_row + max(delay) >= item.end
    return Generation(undo_delay(codes, delay, config.decoder.eos_token_id)[item.first :], codes, item.seed, truncated)


def failure(config: DiaConfig, eos_row: int, status: NDArray[np.int32], item: Plan) -> NumericError | None:
    """The error that a slot's status, `[channels]`, amounts to, or None if no code was chosen by it.

    Once its channel's speech has ended, or all rows are there, a sampled code is not used. Several channels mostly fail
    at once; the earliest row is told, there the lowest channel.
    """
    delay = config.delay_pattern
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


def swap_out(state: DecodeState, slot: int, lane: int, guided: bool) -> Swapped:
    """Copy a slot and its lane's self-attention pages to the host. The pages stay the lane's. Waits for the device."""
    pool, places = state.pool, []
    for owner in state.owners(lane, guided):
        places.append(state.blocks.table[owner, : state.blocks.held(owner)].to(torch.int64))
    keys = [pool.all_keys.index_select(1, place).cpu() for place in places]
    values = [pool.all_values.index_select(1, place).cpu() for place in places]
    return Swapped(state.save(slot), keys, values)


def swap_in(state: DecodeState, slot: int, lane: int, guided: bool, swapped: Swapped) -> None:
    """Put back what `swap_out` took, into any slot and any pages. Raises OutOfPages, with nothing taken."""
    pool, held = state.pool, swapped.keys[0].shape[1]
    state.grow(lane, held * pool.shape.page_size, guided)
    for index, owner in enumerate(state.owners(lane, guided)):
        place = state.blocks.table[owner, :held].to(torch.int64)
        for pages, saved in ((pool.all_keys, swapped.keys[index]), (pool.all_values, swapped.values[index])):
            pages.index_copy_(1, place, saved.to(pages.device, non_blocking=True))
    state.load(slot, swapped.slot)
