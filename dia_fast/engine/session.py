"""Requests whose steps a program makes itself: with some of the layers, several at once, or once more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from dia_fast.engine import batch_rows
from dia_fast.engine.decode_graphs import Capture, Replays, choose_capture
from dia_fast.engine.hooks import StepTensors, step_tensors
from dia_fast.engine.memory import sizes_for
from dia_fast.engine.request import Generation, Request, plan
from dia_fast.errors import InputError, shown
from dia_fast.model.decode_state import DecodeState
from dia_fast.model.model import DiaModel
from dia_fast.model.verify_state import VerifyState
from dia_fast.utils.ambient import isolated
from dia_fast.utils.values import whole_number

MAX_ROWS = 64  # batch rows that the kernels take at once


@dataclass(frozen=True)
class Verified:
    """Steps that were computed at once, on the device. The tensors are written over by the next `Session.verify`.

    Attributes:
        logits: `[drafts + 1, rows, channels, vocab]` float32, what the model predicts after each step; rows as in
            `StepTensors.logits`.
        sampled: `[drafts + 1, batch, channels]` int32, what is sampled from them.
        drafts: `[drafts, batch, channels]` int32, as given.
        agreed: `[drafts, batch]` bool: the draft is what the model samples there, in all channels that are its to
            choose, and the request has not ended before.
    """

    logits: Tensor
    sampled: Tensor
    drafts: Tensor
    agreed: Tensor


Accept: TypeAlias = Callable[[Verified], Tensor]


def longest_agreed(verified: Verified) -> Tensor:
    """Accept the drafts up to the first one that the model would not have sampled: the codes are those of plain steps.

    Returns:
        `[batch]` int64.
    """
    return verified.agreed.cumprod(0, dtype=torch.int64).sum(0)


class Session:
    """Decode a fixed batch of requests under the control of a program, for experiments such as speculative decoding.

    `Engine` is what serves requests. Here nobody joins or leaves, and the program says what is computed next: `step`
    with all layers or some, `verify` for several steps in one pass over the weights, `save` and `restore` to go back.
    Codes and logits are to the bit those of an engine, whichever way they came about.

    Args:
        model: With its weights.
        requests: At most 32, at most 64 batch rows for them all.
        capture: As for `Engine`.

    Attributes:
        tensors: The batch on the device, as a hook sees it: row `b` is that of `requests[b]`. What is in `sampled` are
            choices for step `step[b]`, of which the next `step` forms the codes.

    Raises:
        InputError: For requests that the model cannot take, and for hooks' extras and guidance_steps.
        OutOfPages: If there is no memory for all steps of all requests.
    """

    @isolated()
    def __init__(self, model: DiaModel, requests: Sequence[Request], *, capture: Capture | str | None = "auto") -> None:
        self.model = model
        self._plans = [plan(model.config, request) for request in requests]
        for request in requests:
            if request.extras or request.guidance_steps is not None:
                raise InputError("extras and guidance_steps are for an Engine; a Session has neither")
        rows = len(requests) * (2 if any(item.guided for item in self._plans) else 1)
        if not 0 < rows <= MAX_ROWS:
            raise InputError(f"requests make {rows} batch rows; from 1 to {MAX_ROWS} can be computed")
        sizes = sizes_for(model.config, self._plans, len(requests), model.dtype, model.device)
        self._state = state = DecodeState(model.config, model.ops, sizes, model.dtype, model.device)
        for batch_idx, item in enumerate(self._plans):
            state.cross_blocks.grow(batch_idx, len(item.request.text_ids))
            state.grow(batch_idx, item.end + 1, item.guided)
            for _ in batch_rows.prefill(model, state, batch_idx, item):
                pass
            batch_rows.place(state, batch_idx, item)
        self.tensors: StepTensors = step_tensors(state)
        self._replays = Replays(choose_capture(capture, model))
        self._passes: dict[int, tuple[VerifyState, Verified]] = {}

    @property
    def done(self) -> bool:
        """True if every request has ended. Waits for the device."""
        return bool(self._state.finished.all())

    @property
    def max_drafts(self) -> int:
        """Most drafts of each request that `verify` takes."""
        return MAX_ROWS // self._state.rows - 1

    @isolated()
    def step(self, layers: Sequence[int] | None = None) -> None:
        """Make one step of every request. Waits for nothing.

        Args:
            layers: Indices of the decoder layers to compute; the others are passed by, and hold no keys and values of
                this step. Where these count afterwards, `restore` and make the step anew. By default all.

        Raises:
            InputError: For an index that is none.
        """
        chosen = None if layers is None else self._layers(layers)
        step = partial(self.model.decode_step, self._state, layers=chosen)
        self._replays(("step", chosen), "the decode step", lambda: step)

    @isolated()
    def verify(self, drafts: Tensor, accept: Accept = longest_agreed) -> Verified:
        """Compute the step at hand and one for each draft in one pass, and go on behind the last accepted one.

        The first step is formed from `tensors.sampled`, as in `step`, the others from the drafts. With `n` drafts
        accepted a request is afterwards where `n + 1` calls of `step` would have brought it. Waits for nothing.

        Args:
            drafts: `[drafts, batch, channels]` integers, from 0 to `vocab - 1`, the choices that are tried in the place
                of sampled ones; at most `max_drafts` for each request.
            accept: Returns how many drafts of each request are accepted, `[batch]` integers on the device. It may
                become part of a graph: what is said of `Hooks.in_step` holds for it. Pass the same function each time.

        Raises:
            InputError: For drafts of another shape or type.
        """
        s = self._state
        shape = tuple(s.sampled.shape)
        if not isinstance(drafts, Tensor) or drafts.is_floating_point() or tuple(drafts.shape[1:]) != shape:
            raise InputError(f"drafts must be integers of shape [drafts, {shape[0]}, {shape[1]}], not {shown(drafts)}")
        if not 0 < len(drafts) <= self.max_drafts:
            raise InputError(f"drafts: {len(drafts)} for each request; from 1 to {self.max_drafts} can be verified")
        if not callable(accept):
            raise InputError(f"accept must be a function, not {shown(accept)}")
        v, verified = self._pass(len(drafts) + 1)
        verified.drafts.copy_(drafts.clamp(0, s.logits.shape[-1] - 1))
        launches = partial(self._verify, v, verified, accept)
        self._replays(("verify", len(drafts), accept), "a pass of several steps", lambda: launches)
        return verified

    def save(self) -> Mapping[str, Tensor]:
        """Copy where every request is, on the device, for `restore`."""
        return {name: tensor.clone() for name, tensor in self._place().items()}

    @isolated()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go back to where `save` was called, to make the steps since then anew.

        Keys, values and codes are kept once: one who went back further meanwhile, and on by another way, cannot return.

        Args:
            saved: What `save` returned.
        """
        for name, tensor in self._place().items():
            tensor.copy_(saved[name])

    @isolated()
    def results(self) -> list[Generation]:
        """Return what each request has said so far, as `Engine` would. Waits for the device.

        Raises:
            NumericError: For a request whose logits were no numbers.
        """
        s, found = self._state, []
        steps, codes, status = s.step.tolist(), s.codes.cpu().numpy(), s.status.cpu().numpy()
        for batch_idx, (item, eos_step) in enumerate(zip(self._plans, s.eos_step.tolist(), strict=True)):
            failure = batch_rows.failure(self.model.config, eos_step, status[batch_idx], item)
            if failure is not None:
                raise failure
            found.append(batch_rows.collect(self.model.config, codes[batch_idx, : steps[batch_idx]], eos_step, item))
        return found

    def _verify(self, v: VerifyState, verified: Verified, accept: Accept) -> None:
        s = self._state
        v.inputs[0].copy_(s.sampled)
        self.model.verify(s, v)
        rows = torch.arange(s.batch, dtype=torch.int64, device=s.step.device)
        for j, draft in enumerate(verified.drafts):
            # Where the draft is not what was formed, the prompt or the end of speech says what comes there.
            forced = s.codes[rows, v.step[j + 1].long() - 1] != draft
            verified.agreed[j] = ((v.chosen[j] == draft) | forced).all(-1) & (v.finished[j] == 0)
        v.keep(s, accept(verified))

    def _pass(self, steps: int) -> tuple[VerifyState, Verified]:
        if steps not in self._passes:
            v = VerifyState(self.model.config, self.model.ops, self._state, steps)
            agreed = torch.zeros(steps - 1, self._state.batch, dtype=torch.bool, device=self.model.device)
            self._passes[steps] = v, Verified(v.logits, v.chosen, v.inputs[1:], agreed)
        return self._passes[steps]

    def _layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        count = self.model.config.decoder.num_hidden_layers
        chosen = tuple(sorted({whole_number("layers", index, 0) for index in layers}))
        if chosen and chosen[-1] >= count:
            raise InputError(f"layers: there is no layer {chosen[-1]}; the decoder has {count}, from 0 to {count - 1}")
        return chosen

    def _place(self) -> dict[str, Tensor]:
        return {name: getattr(self._state, name) for name in ("sampled", "step", "eos_step", "finished", "status")}
