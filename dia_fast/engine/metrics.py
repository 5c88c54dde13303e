"""Numbers of an engine at one moment, and an event for each thing that happens to a request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Stats:
    """An engine at one moment.

    Args:
        waiting: Requests that have not started.
        running: Requests in the batch.
        swapped: Requests swapped out for lack of pages.
        steps: Decode steps since the engine was made.
        pages: Pages of self-attention in use.
        text_pages: Pages of cross-attention in use.
        page_bytes: Bytes of all pages in use.
        peak_bytes: The most there were after a step.
        total_bytes: Bytes of the pools.
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

    Args:
        kind: `"queued"`, `"started"`, `"first_frame"`, `"swapped_out"`, `"swapped_in"` or `"ended"`.
        number: Of the request in its engine, from 0, as in `Handle.number`.
        seconds: Since it was queued.
        reason: Of an end, `"done"`, `"failed"`, `"cancelled"` or `"deadline"`.
        frames: Complete at this moment.
        steps: Whose codes the host has, those of the prompt included.
    """

    kind: Literal["queued", "started", "first_frame", "swapped_out", "swapped_in", "ended"]
    number: int
    seconds: float
    reason: str | None = None
    frames: int = 0
    steps: int = 0


Listener: TypeAlias = Callable[[EngineEvent], None]
