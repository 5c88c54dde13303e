"""Numbers of an engine at one moment, and an event for each thing that happens to a request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Stats:
    """An engine at one moment.

    waiting, running, swapped: requests not started, in the batch, and swapped out for lack of pages; steps: decode
    steps since the engine was made; pages, text_pages: in use; page_bytes: bytes of all of them; peak_bytes: the most
    there were after a step; total_bytes: bytes of the pools.
    """

    waiting: int
    running: int
    swapped: int
    steps: int
    pages: int
    text_pages: int
    page_bytes: int
    peak_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class EngineEvent:
    """One thing that happened to one request.

    kind: `"queued"`, `"started"`, `"first_frame"`, `"swapped_out"`, `"swapped_in"` or `"ended"`. number: of the request
    in its engine, from 0, as in `Handle.number`. seconds: since it was queued. reason: of an end, `"done"`,
    `"failed"`, `"cancelled"` or `"deadline"`. frames: complete at this moment. steps: whose codes the
    host has, those of the prompt included.
    """

    kind: Literal["queued", "started", "first_frame", "swapped_out", "swapped_in", "ended"]
    number: int
    seconds: float
    reason: str | None = None
    frames: int = 0
    steps: int = 0


Listener: TypeAlias = Callable[[EngineEvent], None]
