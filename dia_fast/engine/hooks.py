"""Code of one's own in the decode step: hooks, and the tensors that they see."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dia_fast.engine.request import Request
from dia_fast.errors import InputError, shown
from dia_fast.model.decode_state import DecodeState

NUMBER = "number"  # the extra that every engine with hooks has


@dataclass(frozen=True)
class StepTensors:
    """Tensors of one decode step on the device: the engine's own buffers, at the same addresses in every step.

    Row `b` belongs to one request, `number[b]`. Rows that are not `active` are inert, and what they hold means nothing:
    there are some behind the last request (`number[b] == -1`), and a request's own between its end and the moment when
    the host hears of it. In its last step a request is at its end already, and what is sampled is not used.

    Args:
        logits: `[rows, channels, vocab]` float32. The first `batch` rows are conditional. With guidance there are
            `2 * batch`: row `batch + b` is the unconditional one of request `b`.
        hidden: `[rows, hidden]`, the residual stream before the final norm.
        step: `[batch]` int32. What is sampled now are the codes of this step.
        first_step: `[batch]` int32, the step that decoding began with.
        end_step: `[batch]` int32, the last step there may be.
        eos_step: `[batch]` int32, the step at which channel 0 ended; below 0 before that.
        finished: `[batch]` int32.
        codes: `[batch, steps, channels]` int32, delayed; those before `step` are there.
        sampled: `[batch, channels]` int32, which `sample` writes.
        status: `[batch, channels]` int32, see `dia_kernels.reference.sample`.
        seed: `[batch]` int64.
        guidance_scale: `[batch]` float32; 1 for a request without guidance, whose unconditional row means nothing.
        temperature: `[batch]` float32; 0 for greedy.
        top_k: `[batch]` int32; 0 for all.
        top_p: `[batch]` float32.
        extras: `[batch, *shape]` each, by name.
    """

    logits: Tensor
    hidden: Tensor
    step: Tensor
    first_step: Tensor
    end_step: Tensor
    eos_step: Tensor
    finished: Tensor
    codes: Tensor
    sampled: Tensor
    status: Tensor
    seed: Tensor
    guidance_scale: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    extras: Mapping[str, Tensor]

    @property
    def batch(self) -> int:
        """Number of rows of everything but `logits` and `hidden`."""
        return len(self.step)

    @property
    def active(self) -> Tensor:
        """`[batch]` bool, False for inert rows; made anew each time."""
        return (self.step >= 0) & (self.finished == 0)

    @property
    def cond(self) -> Tensor:
        """Conditional logits, `[batch, channels, vocab]`."""
        return self.logits[: self.batch]

    @property
    def uncond(self) -> Tensor | None:
        """Unconditional logits, `[batch, channels, vocab]`; None in a step without guidance."""
        return self.logits[self.batch :] if len(self.logits) > self.batch else None

    @property
    def number(self) -> Tensor:
        """`[batch]` int64: the `Handle.number` of each row's request."""
        return self.extras[NUMBER]


InStep: TypeAlias = Callable[[StepTensors], Any]
AfterStep: TypeAlias = Callable[[StepTensors, tuple[int, ...]], Any]


@dataclass(frozen=True)
class Hooks:
    """Functions that an engine calls in every decode step. Without them a step is what it would be anyway.

    On a GPU `in_step` and `sample` are part of the captured graph: they run in Python twice for each batch size, with
    guidance and without, and their launches are repeated from then on. They work on tensors alone, in place, on the
    current stream, and never wait for the device: no `.item()`, no `if` on a value. A step with a hook that cannot be
    captured runs launch by launch, with a warning. An exception fails the requests of its step with `StepFailed`.

    Args:
        in_step: Called between the heads and the sampling, to read or change logits, sampling parameters or extras.
        sample: Called in the place of the op `sample`. It writes `sampled`, from 0 to `vocab - 1`. The end of a
            sentence is the code `eos_token_id` in channel 0.
        after_step: Called on the host when a step has been launched, which the device may not have begun: with its
            tensors, and the numbers of the requests in the order of the rows. What it launches comes after the step
            and before the next one. What it waits for, every request waits for.
        extras: State or parameters of each request: by name, the value that a request begins with. The engine
            keeps `[batch, *shape]` of each and moves a row with its request. `Request.extras` gives other values.

    Raises:
        InputError: For a hook that is no function, or an extra that is no tensor.
    """

    in_step: InStep | None = None
    sample: InStep | None = None
    after_step: AfterStep | None = None
    extras: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name in ("in_step", "sample", "after_step"):
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise InputError(f"{name} must be a function or None, not {shown(hook)}")
        if not isinstance(self.extras, Mapping):
            raise InputError(f"extras must be a dict of tensors by name, not {shown(self.extras)}")
        for name, value in self.extras.items():
            if not isinstance(name, str) or name == NUMBER:
                raise InputError(f"extras: {shown(name)} cannot be a name; {NUMBER!r} is the number of the request")
            if not isinstance(value, Tensor):
                raise InputError(f"extras: {name} must be a tensor, the value at first, not {shown(value)}")


def buffers(hooks: Hooks | None) -> dict[str, Tensor]:
    """Return the extras of an engine with these hooks, by name, each with its value at first."""
    if hooks is None:
        return {}
    return {NUMBER: torch.tensor(-1, dtype=torch.int64, device="cpu"), **hooks.extras}


def checked_extras(hooks: Hooks | None, request: Request) -> dict[str, Tensor]:
    """Return a copy of a request's extras on the host, in the dtypes of the engine's.

    Raises:
        InputError: For a name, a shape or a dtype that the engine's hooks do not have.
    """
    found = {}
    known = hooks.extras if hooks is not None else {}
    for name, value in (request.extras or {}).items():
        if name not in known:
            raise InputError(f"extras: the hooks of this engine have no {shown(name)}; they have {list(known)}")
        wanted = known[name]
        try:
            given = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"extras: {name} must be {wanted.dtype}, not {shown(value)} ({error})") from None
        if given.shape != wanted.shape or not torch.can_cast(given.dtype, wanted.dtype):
            raise InputError(
                f"extras: {name} must be {wanted.dtype} of shape {list(wanted.shape)}, not {given.dtype} of shape "
                f"{list(given.shape)}"
            )
        found[name] = given.detach().to("cpu", wanted.dtype, copy=True)
        if not wanted.dtype.is_floating_point and not torch.equal(found[name].to(given.dtype), given.detach().cpu()):
            raise InputError(f"extras: {name} has values that {wanted.dtype} cannot hold: {shown(value)}")
    return found


def step_tensors(view: DecodeState) -> StepTensors:
    """Return the tensors of a view of the engine's state."""
    names = [name for name in StepTensors.__dataclass_fields__ if name not in ("hidden", "extras")]
    return StepTensors(
        hidden=view.x, extras=MappingProxyType(view.extras), **{name: getattr(view, name) for name in names}
    )
