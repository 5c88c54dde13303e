"""Sequences in and out of a `DecodeState`: prefill, placing in the batch, swapping out and in, results."""

from collections.abc import Callable, Generator, Hashable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dia_fast.engine.request import Generation, Plan
from dia_fast.engine.sequence import Swapped
from dia_fast.errors import NumericError, not_finite
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState
from dia_fast.model.delay import undo_delay
from dia_fast.model.model import DiaModel
from dia_kernels.reference.sampling import NOT_FINITE

CHUNK = 256
"""Steps of an audio prompt that are computed at once. Fixed, and counted from step 0: where a prompt is cut decides the
last bits of its values, so that must not depend on what else is running."""

Upload = Callable[[Tensor], Tensor]


def prompt_key(model: DiaModel, item: Plan) -> Hashable:
    """Stand for all that the unconditional keys and values of a request's prompt depend on."""
    return (model.revision, item.prompt_bytes) if item.first else None


def begin(model: DiaModel, state: DecodeState, table_idx: int, item: Plan) -> bool:
    """Take the pages that a request begins with; tell if the unconditional half of its prompt is there.

    The rows of the block tables are written in `prefill`.

    Raises:
        OutOfPages: If too few are free; the caller gives back what was taken.
    """
    state.cross_blocks.grow(table_idx, len(item.request.text_ids), write=False)
    shared = item.guided and state.share_prompt(table_idx, prompt_key(model, item), item.first)
    state.grow(table_idx, item.first + 1, item.guided, write=False)
    return shared


def prefill(
    model: DiaModel, state: DecodeState, table_idx: int, item: Plan, upload: Upload | None = None, shared: bool = False
) -> Generator[int, None, Tensor]:
    """Compute keys and values of a request's text and prompt, chunk by chunk; yield the cost of each, in tokens.

    The pages must be there; their rows in the block tables are written here. All that the device has to know of a
    newcomer goes there in one upload. Returns its delayed codes on the device, for `place`.

    Args:
        table_idx: Of the sequence in the block tables.
        upload: Sends host values to the device.
        shared: The unconditional half of the prompt is there.
    """
    ids, count = item.request.text_ids, len(item.request.text_ids)
    tables = [(state.cross_blocks, table_idx)]
    tables += [(state.blocks, table_row) for table_row in state.table_rows(table_idx, item.guided)]
    parts = [torch.tensor(ids, dtype=torch.int32, device="cpu"), item.delayed_codes.flatten().to(torch.int32)]
    parts += [blocks.pages(table_row).to(torch.int32) for blocks, table_row in tables]
    send = upload or (lambda values: values.to(model.device))
    text, codes, *pages = send(torch.cat(parts)).split([len(part) for part in parts])
    for (blocks, table_row), held in zip(tables, pages, strict=True):
        blocks.write_row(table_row, held)
    if state.sizes.guided and not item.guided:
        state.write_spare(table_idx)
    model.store_text(text.to(torch.int64), state.cross_pool, state.cross_blocks.slot_mapping(table_idx, count))
    yield count
    codes = codes.view(item.delayed_codes.shape)
    for text_length in (count, None) if item.guided and not shared else (count,):
        for first in range(0, item.first, CHUNK):
            chunk = codes[first : min(first + CHUNK, item.first)]
            model.prefill(chunk, state, table_idx, text_length, first=first)
            yield len(chunk)
    if item.guided and item.first:
        state.keep_prompt(table_idx, prompt_key(model, item), item.first)
    return codes


def place(
    state: DecodeState,
    batch_idx: int,
    item: Plan,
    codes: Tensor | None = None,
    extras: Mapping[str, Tensor | int] | None = None,
) -> None:
    """Put a prefilled request at its first step into the batch.

    Args:
        codes: What `prefill` returned.
        extras: Values on the device for some of the state's extras; the others get theirs at first.
    """
    params = item.request.params
    if codes is None:
        codes = item.delayed_codes.to(state.codes.device)
    state.codes[batch_idx, : item.first] = codes[: item.first]
    state.prompt_codes[batch_idx] = codes[item.first :]
    state.text_lengths[batch_idx] = len(item.request.text_ids)
    state.seed[batch_idx] = item.seed - 2**64 if item.seed >= 2**63 else item.seed  # the same 64 bits
    state.guidance_scale[batch_idx] = params.guidance_scale or 1.0
    state.temperature[batch_idx] = 0.0 if params.greedy else params.temperature
    state.top_k[batch_idx] = params.top_k or 0
    state.top_p[batch_idx] = params.top_p
    state.first_step[batch_idx], state.end_step[batch_idx] = item.first, item.end
    for name, tensor in state.extras.items():
        tensor[batch_idx] = (extras or {}).get(name, state.first_extras[name])
    state.eos_step[batch_idx], state.finished[batch_idx], state.status[batch_idx] = -1, 0, 0
    state.step[batch_idx] = item.first


def collect(config: DiaConfig, codes: NDArray[np.int32], eos_step: int, item: Plan) -> Generation:
    """The result of a request, from its delayed codes, `[rows, channels]`. eos_row: where speech ends, or below 0."""
    delay = config.delay_pattern
    delayed = torch.from_numpy(codes.copy())
    truncated = eos_step < 0 or eos_step + max(delay) >= item.end
    frames = undo_delay(delayed, delay, config.decoder.eos_token_id)[item.first :]
    return Generation(frames, delayed, item.seed, truncated)


def failure(config: DiaConfig, eos_step: int, status: NDArray[np.int32], item: Plan) -> NumericError | None:
    """The error that a request's status, `[channels]`, amounts to, or None if no code was chosen by it.

    Once its channel's speech has ended, or all steps are done, a sampled code is not used. Several channels mostly fail
    at once; the earliest step is told, there the lowest channel.
    """
    delay = config.delay_pattern
    words = [(word >> 2, channel, word & 3) for channel, word in enumerate(status.tolist()) if word]
    used = [
        (step, channel, kind)
        for step, channel, kind in words
        if step <= item.end and (eos_step < 0 or step < eos_step + delay[channel])
    ]
    if not used:
        return None
    step, channel, kind = min(used)
    where = f"step {step - item.first} (position {step}, channel {channel})"
    if kind == NOT_FINITE:
        return not_finite(where)
    return NumericError(
        f"no code is left to draw at {where}: the {item.request.top_k} best guided codes are all ones that cannot be "
        "spoken. Give a larger top_k, or none"
    )


def swap_out(state: DecodeState, batch_idx: int, table_idx: int, guided: bool) -> Swapped:
    """Copy a sequence's state and self-attention pages to the host. It keeps the pages. Waits for the device."""
    pool, places = state.pool, []
    for table_row in state.table_rows(table_idx, guided):
        places.append(state.blocks.table[table_row, : state.blocks.held(table_row)].to(torch.int64))
    keys = [pool.all_keys.index_select(1, place).cpu() for place in places]
    values = [pool.all_values.index_select(1, place).cpu() for place in places]
    return Swapped(state.save(batch_idx), keys, values)


def swap_in(
    state: DecodeState,
    batch_idx: int,
    table_idx: int,
    guided: bool,
    swapped: Swapped,
    key: Hashable = None,
    prompt: int = 0,
) -> None:
    """Put back what `swap_out` took, at any batch index and in any pages.

    Args:
        key: The request's `prompt_key`: pages of its prompt that are there are shared and not copied.
        prompt: Steps of its prompt.

    Raises:
        OutOfPages: If too few are free; the caller gives back what was taken.
    """
    pool, held = state.pool, swapped.keys[0].shape[1]
    if guided:  # a page that is not full has other tokens behind those of the prompt now
        state.share_prompt(table_idx, key, prompt // pool.shape.page_size * pool.shape.page_size)
    rows = [(row, state.blocks.held(row)) for row in state.table_rows(table_idx, guided)]
    state.grow(table_idx, held * pool.shape.page_size, guided, write=False)
    for index, (table_row, there) in enumerate(rows):
        place = state.blocks.pages(table_row).to(pool.all_keys.device)
        state.blocks.write_row(table_row, place)
        for pages, saved in ((pool.all_keys, swapped.keys[index]), (pool.all_values, swapped.values[index])):
            pages.index_copy_(1, place[there:], saved[:, there:].to(pages.device, non_blocking=True))
    if state.sizes.guided and not guided:
        state.write_spare(table_idx)
    state.load(batch_idx, swapped.state)
