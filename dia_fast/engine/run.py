"""The engine's own record of a request."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from dia_fast.engine.request import Plan

if TYPE_CHECKING:
    from dia_fast.engine.handle import Handle


@dataclass
class Parked:
    """What a request had on the device, on the host: its slot, and the contents of its self-attention pages.

    pages: for each layer and owner, keys and values `[held, kv_heads, page_size, head_dim]`.
    """

    slot: dict[str, Tensor]
    pages: list[list[tuple[Tensor, Tensor]]]


@dataclass(eq=False)
class Run:
    """A submitted request: `number` in order of submission, `lane` of its pages (-1: none yet).

    row: rows of the grid that exist on the device, unless the request has finished since; received: rows that a stream
    has been given; prefill: what is left to do before the first step, cost by cost.
    """

    handle: "Handle"
    plan: Plan
    number: int
    streams: bool
    lane: int = -1
    row: int = 0
    received: int = 0
    prefill: Iterator[int] | None = field(default=None, repr=False)
    parked: Parked | None = field(default=None, repr=False)

    @property
    def guided(self) -> bool:
        return self.plan.guided

    @property
    def rows_needed(self) -> int:
        """Rows that must have pages before the next step."""
        return min(self.row, self.plan.end) + 1
