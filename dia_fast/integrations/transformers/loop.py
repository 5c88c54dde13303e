"""The loop that takes the place of transformers' own: the engine's steps, and what a streamer hears of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dia_fast.engine import MAX_BATCH, Engine, Generation, Request, plan
from dia_fast.engine.memory import sizes_for
from dia_fast.model.decode_state import Sizes, cross_pages
from dia_fast.model.model import DiaModel

# Sizes are rounded up, so that calls of some variety find room in the engine of the first.
_ROWS, _TEXT = 512, 256


def speak(
    engine: Engine, requests: Sequence[Request], heard: Callable[[list[Tensor]], None] | None = None
) -> list[Generation]:
    """All requests to their ends.

    Args:
        heard: Called after each step with the rows that each request has so far.
    """
    handles = []
    try:
        handles += [engine.submit(request, stream=heard is not None) for request in requests]
        while not all(handle.done for handle in handles):
            engine.advance()
            if heard is not None:
                heard([handle.delayed_codes() for handle in handles])
        return [handle.result() for handle in handles]
    finally:
        for handle in handles:
            handle.cancel()


class Columns:
    """Gives a streamer of transformers a column of `batch * channels` codes as soon as all items have that row.

    Args:
        known: Rows that were there before.
        pads: Padding rows before each item.
        pad: The code after an item's end.
    """

    def __init__(self, streamer: Any, known: int, pads: Sequence[int], pad: int) -> None:
        self.streamer, self.sent, self.pads, self.pad = streamer, known, pads, pad

    def __call__(self, rows: list[Tensor]) -> None:
        there = min(late + len(item) for late, item in zip(self.pads, rows, strict=True))
        for index in range(self.sent, there):
            column = [item[index - late] for late, item in zip(self.pads, rows, strict=True)]
            self.streamer.put(torch.cat(column).long())
        self.sent = max(self.sent, there)

    def end(self, rows: Tensor) -> None:
        """The columns that are left, of the whole result `[batch * channels, rows]`, and the end."""
        for column in rows[:, self.sent :].cpu().unbind(1):
            self.streamer.put(column)
        self.streamer.end()


def sizes_with_room(model: DiaModel, requests: Sequence[Request]) -> Sizes:
    """Sizes of an engine for these requests and for somewhat longer ones.

    Raises:
        InputError: For what cannot be.
    """
    plans = [plan(model.config, request) for request in requests]
    longer = [replace(item, end=_up(item.end + 1, _ROWS) - 1) for item in plans]
    sizes = sizes_for(model.config, longer, MAX_BATCH, model.dtype, model.device)
    texts = sorted((_up(len(request.text_ids), _TEXT) for request in requests), reverse=True)[:MAX_BATCH]
    pages = sizes.pages if sizes.guided else 2 * sizes.pages
    text_pages = sum(cross_pages(model.config).pages(length) for length in texts)
    return replace(sizes, guided=True, text=texts[0], pages=pages, text_pages=text_pages)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def holds(there: Sizes, wanted: Sizes) -> bool:
    """Tell whether an engine of these sizes has room for what would be made for others."""
    return all(
        getattr(there, name) >= getattr(wanted, name) for name in ("batch", "steps", "text", "pages", "text_pages")
    )
