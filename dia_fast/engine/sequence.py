"""A request being run, and the one state that it is in."""

import enum
import math
from collections.abc import Generator, Mapping
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
    """A sequence's decode state and self-attention pages, on the host.

    Attributes:
        state: By name, the sequence's part of each per-request buffer of a `DecodeState`.
        keys: For each of its table rows `[layers, held, kv_heads, page_size, head_dim]`.
        values: As keys.
    """

    state: dict[str, Tensor]
    keys: list[Tensor]
    values: list[Tensor]


@dataclass(eq=False)
class Sequence:
    """A submitted request.

    Attributes:
        plan: The checked request.
        number: In the order of submission; it never changes.
        priority: Lower ones go first.
        deadline: On the device's clock.
        mark: The caller's work that it has to follow.
        submitted: When, on the device's clock.
        codes: `[end + 1, channels]` int32, delayed; the first `received` have come from the device.
        table_idx: Its index in the block tables, -1 for none.
        step: Its step on the device when the engine had made `since` steps; it grows by one with each until the end.
        passed: How often a later one was let in before it.
        wanted: Frames beyond which nobody is in a hurry, see `Handle.want`.
        extras: Values for extras of the engine's hooks, on the host.
        guided: A second, unconditional row is computed in the next step.
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
    codes: NDArray[np.int32] | None = field(default=None, repr=False)
    received: int = 0
    table_idx: int = -1
    step: int = 0
    since: int = 0
    passed: int = 0
    wanted: float = math.inf
    prefill: Generator[int, None, Tensor] | None = field(default=None, repr=False)
    swapped: Swapped | None = field(default=None, repr=False)
    extras: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    guided: bool = field(init=False)

    def __post_init__(self) -> None:
        self.guided = self.plan.guided

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

    def begin(self, channels: int) -> None:
        """Make room for the codes to come. Those of the prompt are known."""
        codes = np.zeros((self.plan.end + 1, channels), np.int32)
        codes[: self.plan.first] = self.plan.delayed_codes[: self.plan.first].numpy()
        self.codes, self.received, self.step = codes, self.plan.first, self.plan.first

    def receive(self, recent: NDArray[np.int32], step: int) -> None:
        """Take the new ones of the last codes, `[n, channels]`, before the step that the device is at."""
        new = step - self.received
        if new > 0:
            assert self.codes is not None and new <= len(recent)
            self.codes[self.received : step] = recent[len(recent) - new :]
            self.received = step  # after the codes: other threads read up to here

    def end(
        self,
        outcome: Literal["done", "failed", "cancelled"],
        generation: Generation | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Set the result. The last assignment counts: before it nothing has happened, after it all has."""
        self.generation, self.error, self.outcome = generation, error, outcome
        self.prefill = self.swapped = None
        self.state = State.ENDED
