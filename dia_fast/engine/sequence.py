"""A request being run, and the one state that it is in."""

import enum
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dia_fast.engine.request import Generation, Plan

Status = Literal["waiting", "running", "done", "failed", "cancelled"]


class State(enum.Enum):
    """Of a sequence. Each but ENDED has one container in the scheduler."""

    WAITING = enum.auto()
    PREFILLING = enum.auto()
    RUNNING = enum.auto()
    SWAPPED = enum.auto()
    ENDED = enum.auto()


@dataclass
class Swapped:
    """The contents of a sequence's slot and self-attention pages, on the host.

    keys, values: for each owner `[layers, held, kv_heads, page_size, head_dim]`.
    """

    slot: dict[str, Tensor]
    keys: list[Tensor]
    values: list[Tensor]


@dataclass(eq=False)
class Sequence:
    """A submitted request.

    number: in order of submission; it never changes. priority: lower ones go first. deadline: on the device's clock.
    mark: the caller's work that it has to follow. lane: of its pages, -1 for none. row: rows that existed on the device
    when the engine had made `since` steps; with every step there is one more until the end. rows: `[end + 1, channels]`
    int32, of which the first `received` have come from the device. passed: how often a later one was let in before it.
    """

    plan: Plan
    number: int
    priority: int = 0
    deadline: float | None = None
    mark: Any = None
    submitted: float = 0.0
    state: State = State.WAITING
    outcome: Literal["done", "failed", "cancelled"] | None = None
    error: BaseException | None = None
    generation: Generation | None = None
    rows: NDArray[np.int32] | None = field(default=None, repr=False)
    received: int = 0
    lane: int = -1
    row: int = 0
    since: int = 0
    passed: int = 0
    prefill: Generator[int, None, Tensor] | None = field(default=None, repr=False)
    swapped: Swapped | None = field(default=None, repr=False)

    @property
    def order(self) -> tuple[int, int]:
        """By which sequences are served."""
        return self.priority, self.number

    @property
    def status(self) -> Status:
        if self.state is State.ENDED:
            assert self.outcome is not None
            return self.outcome
        return "waiting" if self.state is State.WAITING else "running"

    @property
    def done(self) -> bool:
        return self.state is State.ENDED

    @property
    def guided(self) -> bool:
        return self.plan.guided

    def begin(self, channels: int) -> None:
        """Make room for the rows to come. Those of the prompt are known."""
        rows = np.zeros((self.plan.end + 1, channels), np.int32)
        rows[: self.plan.first] = self.plan.grid[: self.plan.first].numpy()
        self.rows, self.received, self.row = rows, self.plan.first, self.plan.first

    def receive(self, recent: NDArray[np.int32], row: int) -> None:
        """Take the new ones of the last rows, `[n, channels]`, of the `row` that there are on the device."""
        new = row - self.received
        if new > 0:
            assert self.rows is not None and new <= len(recent)
            self.rows[self.received : row] = recent[len(recent) - new :]
            self.received = row  # after the rows: other threads read up to here

    def end(
        self,
        outcome: Literal["done", "failed", "cancelled"],
        generation: Generation | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Set what became of it. The last assignment counts: before it nothing has happened, after it all has."""
        self.generation, self.error, self.outcome = generation, error, outcome
        self.prefill = self.swapped = None
        self.state = State.ENDED
