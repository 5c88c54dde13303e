"""Continuous batching: requests join and leave between the steps of one batch."""

import math
import os
import threading
import weakref
from bisect import insort
from collections import deque
from functools import partial

import numpy as np
from torch import Tensor

from dia_fast.engine import batch_rows
from dia_fast.engine.decode_graphs import Capture, Stepper, choose_capture
from dia_fast.engine.device import Device, Event, device_for
from dia_fast.engine.handle import Handle
from dia_fast.engine.hooks import NUMBER, Hooks, buffers, checked_extras, step_tensors
from dia_fast.engine.memory import sizes_for_any
from dia_fast.engine.metrics import EngineEvent, Listener, Stats
from dia_fast.engine.polling import Polling, Report
from dia_fast.engine.request import Request, plan
from dia_fast.engine.sequence import Sequence, State
from dia_fast.errors import DiaFastError, InputError, OutOfPages, shown
from dia_fast.model.decode_state import DecodeState, Sizes
from dia_fast.model.model import DiaModel
from dia_fast.utils.ambient import isolated
from dia_fast.utils.forks import OneProcess, renew_in_child
from dia_fast.utils.out_of_memory import out_of_memory
from dia_fast.utils.values import real_number, whole_number
from dia_fast.utils.warn import warn

MAX_BATCH = 32  # requests; the kernels take two batch rows for each and at most 64
RUN_AHEAD = 2  # steps that are launched and have not ended, at most
MAX_PASSED = 8  # how often others may be let in before one that needs more pages than there are


class StepFailed(DiaFastError, RuntimeError):
    """A decode step broke off, and with it every request that was running. Its cause is in `__cause__`."""


class EngineFull(DiaFastError, RuntimeError):
    """As many requests wait as may; submit again later."""


class DeadlineExceeded(DiaFastError, TimeoutError):
    """The request was not done by its deadline."""


class Engine(OneProcess):
    """Runs many requests as one batch. `submit` them, then wait for their handles, or call `step` until it says False.

    Without `start` there is no thread of its own: whoever waits makes the steps, and several threads may wait at once.
    A request's codes depend on the request alone, never on what runs beside it. `submit`, `Handle.cancel` and `stats`
    never wait for a step.

    The host is at most two steps ahead of the device. A request takes pages as it grows. When none are left, the
    request that is last in line is swapped out to the host until there are, with nothing lost.

    Args:
        model: With its weights.
        max_batch: Most requests at once, 1 to 32; more wait their turn.
        memory: Bytes for pages of keys and values; by default as much as `max_batch` requests could need, at most half
            of what is free.
        prefill_tokens: Most tokens of text and prompt that are prefilled between two decode steps, at least one chunk
            (256 tokens of a prompt, or one text).
        capture: Makes a graph of a step: by default CUDA graphs, for Triton kernels on a GPU; None for none.
        sizes: Instead of memory and max_batch.
        max_waiting: Most requests that wait, beside those that fill the batch; None for any number.
        on_event: Called with an `EngineEvent` for each thing that happens to a request, by the thread that makes steps
            (`"queued"`: that submits). It must be quick; errors in it become warnings.
        device: What the steps run on; by default the model's.
        hooks: Functions of the caller's that are called in every step, see `dia_fast.engine.Hooks`.

    Raises:
        InputError: For arguments that cannot be.
    """

    @isolated()
    def __init__(
        self,
        model: DiaModel,
        *,
        max_batch: int = MAX_BATCH,
        memory: int | None = None,
        prefill_tokens: int = 256,
        capture: Capture | str | None = "auto",
        sizes: Sizes | None = None,
        max_waiting: int | None = None,
        on_event: Listener | None = None,
        device: Device | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        if not 1 <= max_batch <= MAX_BATCH:
            raise InputError(f"max_batch must be from 1 to {MAX_BATCH}, not {max_batch}")
        if prefill_tokens < 1:
            raise InputError(f"prefill_tokens must be at least 1, not {prefill_tokens}")
        if max_waiting is not None and whole_number("max_waiting", max_waiting, 0) < 0:
            raise InputError(f"max_waiting must be 0 or more, or None, not {max_waiting}")
        if hooks is not None and not isinstance(hooks, Hooks):
            raise InputError(f"hooks must be a dia_fast.engine.Hooks or None, not {shown(hooks)}")
        self.model, self.prefill_tokens, self.max_waiting = model, prefill_tokens, max_waiting
        self.device = device or device_for(model.device)
        if sizes is None:
            sizes = sizes_for_any(model.config, max_batch, memory, model.dtype, model.device)
        with self.device.active():
            self.state = DecodeState(model.config, model.ops, sizes, model.dtype, model.device, buffers(hooks))
            self._polling = Polling(self.state, self.device)
            self._stepper = Stepper(model, self.state, choose_capture(capture, model), hooks)
        self.on_event, self.hooks = on_event, hooks
        self._process = os.getpid()
        self._renew()
        renew_in_child(self)
        self._ticks = 0
        self._inbox: deque[tuple[str, Sequence]] = deque()
        self._submitted = self._steps = self._peak = 0
        # Every sequence that has not ended, by number; besides, each is in the container of its state.
        self._live: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []  # in the order of service
        self._newcomer: Sequence | None = None
        self._running: list[Sequence] = []  # in the order of the batch
        self._swapped: list[Sequence] = []  # in the order of service
        self._free_table_idxs = list(reversed(range(sizes.batch)))
        self._unfinished_work = False
        self._launched: deque[Event] = deque()
        self._unreported = 0
        self._deadline = math.inf
        self._view: DecodeState | None = None  # as the running sequences are shown; None when they have changed
        self._grow_at = 0.0  # the number of steps at which one of them needs another page
        self._unguide_at = math.inf  # the number of steps at which the guidance of one of them ends

    def _renew(self) -> None:
        """In a new process: locks of its own, and no thread. The requests are left to the parent."""
        # Who makes a step holds `lock`. `_turn` is notified after each; `_door` is held for a moment by `submit`.
        self.lock, self._turn, self._door = threading.Lock(), threading.Condition(), threading.Lock()
        self._driver: threading.Thread | None = None
        self._wake, self._stop = threading.Event(), threading.Event()

    @property
    def _ours(self) -> bool:
        return self._process == os.getpid()

    def _check_process(self) -> None:
        if not self._ours:
            raise InputError("this engine was made before the process was forked: make another one in the child")

    @isolated()
    def submit(
        self, request: Request, *, stream: bool = False, priority: int = 0, deadline: float | None = None
    ) -> Handle:
        """Queue a request. Waits for nothing.

        Args:
            request: What to speak.
            stream: Has no effect: the frames of every request can be read as they come.
            priority: Requests with a lower one go first; among equals, first come, first served.
            deadline: Seconds from now after which the request fails, wherever it is.

        Raises:
            InputError: For a request that the model cannot take.
            OutOfPages: For one that could never begin.
            EngineFull: If `max_waiting` others wait.
        """
        self._check_process()
        item, extras = plan(self.model.config, request), checked_extras(self.hooks, request)
        sizes, state = self.state.sizes, self.state
        if item.guided and not state.guided:
            raise InputError("guidance_scale: this engine was made for requests without guidance")
        if item.end + 1 > sizes.steps or len(request.text_ids) > sizes.text:
            raise InputError(f"this engine was made for {sizes.steps} steps and {sizes.text} bytes of text at most")
        needs = (state.pages_needed(item.first + 1, item.guided), state.cross_pool.shape.pages(len(request.text_ids)))
        if needs[0] > sizes.pages or needs[1] > sizes.text_pages:
            raise OutOfPages(
                f"the request needs {needs[0]} pages and {needs[1]} of text to begin, and the cache has {sizes.pages} "
                f"and {sizes.text_pages}; give the engine more memory, or shorten the text or the prompt"
            )
        now = self.device.now()
        if deadline is not None and not real_number("deadline", deadline) > 0:
            raise InputError(f"deadline must be a number of seconds above 0, or None, not {deadline}")
        due, mark = None if deadline is None else now + deadline, self.device.caller_mark()
        with self._door:
            submitted = sum(command == "submit" for command, _ in list(self._inbox))
            waiting = len(self._waiting) + submitted - len(self._free_table_idxs)  # below 0: the batch has room
            if self.max_waiting is not None and waiting >= self.max_waiting:
                raise EngineFull(f"{waiting} requests wait already, and max_waiting is {self.max_waiting}; try later")
            sequence = Sequence(item, self._submitted, whole_number("priority", priority, -(1 << 31)), due, mark, now)
            sequence.extras = extras
            handle = Handle(sequence, self.model.config, self.advance, self.cancel, self._wake_up)
            self._submitted += 1
            self._emit("queued", sequence)
            self._inbox.append(("submit", sequence))
        self._wake.set()
        return handle

    def step(self) -> bool:
        """A bounded piece of work: some prefill for a newcomer, then one decode step of all that run.

        Returns whether there is work left. What goes wrong ends up in the handles of those it concerns: one request, or
        all that have begun. Only an interruption (Ctrl-C) is raised, after every request that had begun has failed; the
        engine can be used again.
        """
        self._check_process()
        with self.lock, isolated(default_device=False), self.device.active():
            self._guarded_step()
        self._read_left_over()
        with self._turn:
            self._ticks += 1
            self._turn.notify_all()
        return bool(self._live or self._inbox)

    def advance(self, timeout: float | None = None) -> None:
        """Run one step, or wait for the step that another thread is running.

        So every thread that waits looks at its handle after every step, whoever made it.

        Args:
            timeout: Most seconds to wait for another thread.
        """
        left = math.inf if timeout is None else timeout
        with self._turn:
            ticks = self._ticks
            self._wake.set()  # the caller may have looked before the last step: a thread that rests makes another one
            while self._ticks == ticks and left > 0 and (self._driven or self.lock.locked()):
                # A thread that is interrupted may end a step without a word: look again now and then.
                self._turn.wait(min(left, 0.05))
                left -= 0.05
            if self._ticks != ticks or left <= 0:
                return
        self.step()

    def cancel(self, sequence: Sequence) -> None:
        """End a request as `Handle.cancel` does.

        Args:
            sequence: Of this engine.
        """
        if not sequence.done and self._ours:
            self._inbox.append(("cancel", sequence))
            self._wake.set()
            self._read_left_over()

    def start(self) -> None:
        """Make the steps in a thread of its own from now on, until `stop` or `close`. Does nothing if there is one.

        It rests while every request has the frames that are wanted of it, see `Handle.want`.
        """
        with self._door:
            if self._driver is not None and self._driver.is_alive():
                return
            self._stop = threading.Event()
            inputs = (weakref.ref(self), self._wake, self._stop)
            self._driver = threading.Thread(target=_drive, args=inputs, name="dia-fast-engine", daemon=True)
            # The thread ends with an engine that nobody holds, and before the interpreter does.
            self._finalizer = weakref.finalize(self, _end, self._driver, self._wake, self._stop)
            self._driver.start()

    def stop(self) -> None:
        """End the thread of `start`, after the step that it makes. Requests go on when somebody waits for them."""
        with self._door:  # another caller's `start` is over, or has not begun
            driver, self._driver = self._driver, None
            self._stop.set()
            self._wake.set()
            if driver is not None:
                self._finalizer.detach()
        _join(driver)

    def _wake_up(self) -> None:
        self._wake.set()

    def close(self) -> None:
        """Cancel everything that is not done, and end the thread of `start`."""
        self.stop()
        for _, sequence in list(self._inbox):
            self.cancel(sequence)
        for sequence in list(self._live.values()):
            self.cancel(sequence)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def steps(self) -> int:
        """Decode steps since the engine was made."""
        return self._steps

    @property
    def stats(self) -> Stats:
        """The engine's numbers, as they are in the middle of whatever it does. Waits for nothing."""
        state = self.state
        submitted = sum(command == "submit" for command, _ in list(self._inbox))
        return Stats(
            waiting=len(self._waiting) + submitted + (self._newcomer is not None),
            running=len(self._running),
            swapped=len(self._swapped),
            steps=self._steps,
            pages=state.pool.pages - state.pool.free,
            text_pages=state.cross_pool.pages - state.cross_pool.free,
            page_bytes=self._bytes(state.pool.free, state.cross_pool.free),
            peak_bytes=self._peak,
            total_bytes=self._bytes(0, 0),
        )

    @property
    def _driven(self) -> bool:
        driver = self._driver
        return driver is not None and driver.is_alive() and driver is not threading.current_thread()

    def _bytes(self, free: int, text_free: int) -> int:
        """Bytes of all pages but the free ones."""
        state, dtype = self.state, self.model.dtype
        text = (state.cross_pool.pages - text_free) * state.cross_pool.shape.bytes(dtype)
        return (state.pool.pages - free) * state.pool.shape.bytes(dtype) + text

    def _emit(self, kind: str, sequence: Sequence, reason: str | None = None) -> None:
        if self.on_event is None:
            return
        frames = self._complete(sequence)
        if sequence.generation is not None:
            frames = len(sequence.generation.frames)
        seconds = self.device.now() - sequence.submitted
        try:
            self.on_event(EngineEvent(kind, sequence.number, seconds, reason, frames, sequence.received))  # type: ignore[arg-type]
        except Exception as error:
            warn(f"on_event raised {type(error).__name__}: {error}", RuntimeWarning)

    def _complete(self, sequence: Sequence) -> int:
        """Frames that the host has all codes of."""
        return max(sequence.received - sequence.plan.first - 1 - max(self.model.config.delay_pattern), 0)

    def _pause(self) -> float:
        """Seconds for which there is nothing that anyone wants: 0 if there is, infinity until the next command."""
        live = list(self._live.values())
        if self._inbox or any(
            sequence.state is not State.RUNNING or self._complete(sequence) < sequence.wanted for sequence in live
        ):
            return 0.0
        return max(self._deadline - self.device.now(), 0.0)

    # One step

    def _guarded_step(self) -> None:
        """One step; whatever breaks off in its middle, now or the last time, leaves no sequence without an end."""
        if self._unfinished_work:
            self._recover(None)
        self._unfinished_work = True
        try:
            self._read_inbox()
            self._expire()
            self._bound()
            self._admit()
            self._end_guidance()
            self._make_room()
            if self._running:
                self._decode()
            self._read_inbox()
        except BaseException as error:
            self._recover(error)
            self._unfinished_work = False
            if not isinstance(error, Exception):
                raise
        self._unfinished_work = False

    def _bound(self) -> None:
        """Wait until fewer steps are under way than may be, and read what has arrived by then."""
        while len(self._launched) >= RUN_AHEAD:
            self._launched[0].wait()
            self._launched.popleft()
        self._read_reports()

    def _read_reports(self) -> None:
        for report in self._polling.arrived():
            self._hear(report)

    def _settle(self) -> None:
        """Wait for all steps under way, so that the host knows what the device does."""
        if self._unreported and self._running:
            self._launched.append(self._polling.send(list(self._running)))
            self._unreported = 0
        while self._launched:
            self._launched[0].wait()
            self._launched.popleft()
        self._read_reports()

    def _recover(self, cause: BaseException | None) -> None:
        """After an error or an interruption anywhere: fail all that has begun, start over with all pages free.

        May be interrupted itself and called again: it goes by `_live` and the states alone.
        """
        told = "in the middle of a step" if cause is None else f"by {type(cause).__name__}: {cause}".rstrip(": ")
        failed = (cause and out_of_memory(cause)) or StepFailed(f"interrupted {told}")
        failed.__cause__ = cause
        self._polling.forget()
        self._launched.clear()
        self._running, self._swapped, self._newcomer, self._view, self._unreported = [], [], None, None, 0
        self._free_table_idxs = list(reversed(range(self.state.capacity)))
        self.state.reset()
        for sequence in list(self._live.values()):
            if sequence.state is not State.WAITING:
                if not sequence.done:
                    sequence.end("failed", error=failed)
                    self._emit("ended", sequence, "failed")
                self._live.pop(sequence.number, None)
        self._waiting = sorted(self._live.values(), key=lambda sequence: sequence.order)

    # Commands

    def _read_inbox(self) -> None:
        """Do what was asked for meanwhile. A command leaves the inbox when it has been done, and may be done twice."""
        while self._inbox:
            command, sequence = self._inbox[0]
            if command == "cancel":
                self._end(sequence, "cancelled")
            elif sequence.number not in self._live and not sequence.done:
                self._live[sequence.number] = sequence
                insort(self._waiting, sequence, key=lambda other: other.order)
                self._deadline = min(self._deadline, sequence.deadline or math.inf)
            self._inbox.popleft()

    def _read_left_over(self) -> None:
        """Do what was asked for while a step was made, unless another one is being made, whose end will see to it.

        The garbage collector can call this anywhere, also in a thread that makes a step: it never waits for that.
        """
        while self._inbox and not self.lock.locked():
            with self.lock, isolated(), self.device.active():
                self._guarded_inbox()

    def _guarded_inbox(self) -> None:
        try:
            self._read_inbox()
        except BaseException as error:
            self._recover(error)
            if not isinstance(error, Exception):
                raise

    def _expire(self) -> None:
        """End those that are not done by their deadline."""
        now = self.device.now() if self._deadline < math.inf else 0.0
        if now < self._deadline:
            return
        for sequence in list(self._live.values()):
            if sequence.deadline is not None and sequence.deadline <= now:
                asked = sequence.deadline - sequence.submitted
                self._end(sequence, "failed", DeadlineExceeded(f"the request is not done after {asked:g} s"))
        self._deadline = min((item.deadline or math.inf for item in self._live.values()), default=math.inf)

    # Joining

    def _admit(self) -> None:
        """Let swapped sequences back in, then newcomers, for as much work as a step may do."""
        while self._swapped and self._fits(self._swapped[0]):
            self._swap_in(self._swapped[0])
        spent = 0
        while (sequence := self._newcomer or self._next_newcomer()) is not None:
            try:
                assert sequence.prefill is not None
                spent += next(sequence.prefill)
            except StopIteration as stop:
                self._place(sequence, stop.value)
            except Exception as error:
                self._fail_alone(sequence, error)
            if self._running and spent >= self.prefill_tokens:
                return

    def _next_newcomer(self) -> Sequence | None:
        """Begin with the first waiting sequence that there is room for.

        One that needs more pages than there are lets others pass, but not for ever.
        """
        if not self._waiting or self._swapped or not self._free_table_idxs:
            return None
        for index, sequence in enumerate(self._waiting[: MAX_PASSED + 1]):
            if self._fits(sequence):
                for other in self._waiting[:index]:
                    other.passed += 1
                self._begin(sequence)
                return self._newcomer
            if sequence.passed >= MAX_PASSED:
                return None
        return None

    def _begin(self, sequence: Sequence) -> None:
        """Give a waiting sequence its index in the block tables and its pages."""
        state, item = self.state, sequence.plan
        sequence.state = State.PREFILLING
        self._waiting.remove(sequence)
        self._newcomer = sequence
        sequence.table_idx = self._free_table_idxs.pop()
        try:
            self.device.follow(sequence.mark)
            shared = batch_rows.begin(self.model, state, sequence.table_idx, item)
            upload = self.device.upload
            sequence.prefill = batch_rows.prefill(self.model, state, sequence.table_idx, item, upload, shared)
        except Exception as error:
            self._fail_alone(sequence, error)
            return
        self._emit("started", sequence)

    def _place(self, sequence: Sequence, codes: object) -> None:
        """Let a sequence whose prefill is done into the batch."""
        batch_idx = len(self._running)
        try:
            extras: dict[str, Tensor | int] = {name: self.device.upload(x) for name, x in sequence.extras.items()}
            extras[NUMBER] = sequence.number
            batch_rows.place(self.state, batch_idx, sequence.plan, codes, extras)  # type: ignore[arg-type]
            sequence.begin(self.state.codes.shape[2])
        except Exception as error:
            self.state.clear(batch_idx)
            self._fail_alone(sequence, error)
            return
        self._newcomer = sequence.prefill = None
        self._join(sequence)

    def _join(self, sequence: Sequence) -> None:
        sequence.since = self._steps
        self._running.append(sequence)
        sequence.state = State.RUNNING
        self._view = None

    def _swap_in(self, sequence: Sequence) -> None:
        batch_idx, item = len(self._running), sequence.plan
        key = batch_rows.prompt_key(self.model, item)
        assert sequence.swapped is not None
        try:
            batch_rows.swap_in(
                self.state, batch_idx, sequence.table_idx, sequence.guided, sequence.swapped, key, item.first
            )
        except Exception as error:
            self.state.clear(batch_idx)
            self._fail_alone(sequence, error)
            return
        self._swapped.remove(sequence)
        sequence.swapped = None
        self._join(sequence)
        self._emit("swapped_in", sequence)

    def _fits(self, sequence: Sequence) -> bool:
        """Tell if a waiting or swapped sequence can go on, with a page left for each batch row that will need one."""
        state, item = self.state, sequence.plan
        if sequence.state is State.SWAPPED:
            if not self._running:
                return True  # it fitted before; if it cannot grow now that it is alone, it never can
        elif state.cross_pool.shape.pages(len(item.request.text_ids)) > state.cross_pool.free:
            return False
        pages = state.pool.shape.pages
        growing = [other for other in self._running if pages(other.plan.end + 1) > state.blocks.held(other.table_idx)]
        spare = sum(2 if other.guided else 1 for other in growing)
        key, prompt = batch_rows.prompt_key(self.model, item), item.first
        needed = state.pages_needed(max(sequence.step, prompt) + 1, sequence.guided, key, prompt)
        return needed + spare <= state.pool.free

    # Stepping

    def _step_of(self, sequence: Sequence) -> int:
        """The step of a running sequence after all launched steps, unless it has finished since."""
        return sequence.step + self._steps - sequence.since

    def _end_guidance(self) -> None:
        """Go on without guidance where only steps that have been launched were to have it."""
        if self._view is not None and self._steps < self._unguide_at:
            return
        self._unguide_at = math.inf
        for batch_idx, sequence in enumerate(self._running):
            if not sequence.guided:
                continue
            left = sequence.plan.last_guided + 1 - self._step_of(sequence)
            if left > 0:
                self._unguide_at = min(self._unguide_at, self._steps + left)
            else:
                sequence.guided, self._view = False, None
                self.state.end_guidance(batch_idx, sequence.table_idx)

    def _make_room(self) -> None:
        """Take pages for the next step of every running sequence, the first in line first; the last one makes way."""
        if self._view is not None and self._steps < self._grow_at:
            return
        held, size, now = self.state.blocks.held, self.state.pool.shape.page_size, self._steps
        room = [held(sequence.table_idx) * size for sequence in self._running]
        due = [
            sequence
            for sequence, steps in zip(self._running, room, strict=True)
            if steps <= now + sequence.step - sequence.since and steps <= sequence.plan.end
        ]
        grown: list[tuple[int, int]] = []
        for sequence in sorted(due, key=lambda sequence: sequence.order):
            while sequence.state is State.RUNNING:
                try:
                    steps = min(self._step_of(sequence), sequence.plan.end) + 1
                    grown += self.state.grow(sequence.table_idx, steps, sequence.guided, write=False)
                    break
                except OutOfPages as error:
                    self.state.blocks.write_grown(grown)  # whoever leaves or makes way may be among them
                    grown = []
                    if self._launched or self._unreported:
                        self._settle()  # some may have ended by now
                    else:
                        self._make_way(sequence, error)
        self.state.blocks.write_grown(grown)
        self._peak = max(self._peak, self._bytes(self.state.pool.free, self.state.cross_pool.free))
        self._grow_at = min(
            (held(other.table_idx) * size - other.step + other.since for other in self._running), default=0.0
        )

    def _make_way(self, sequence: Sequence, error: OutOfPages) -> None:
        """Free pages for a sequence: those of the newcomer, or of the last in line that runs. Alone, it fails."""
        if self._newcomer:
            newcomer = self._newcomer
            self._drop(newcomer)
            newcomer.state = State.WAITING
            insort(self._waiting, newcomer, key=lambda other: other.order)
            return
        last = max(self._running, key=lambda other: other.order)
        if len(self._running) == 1:
            self._end(sequence, "failed", OutOfPages(f"the request has grown beyond the whole cache: {error}"))
            return
        try:
            swapped = batch_rows.swap_out(self.state, self._running.index(last), last.table_idx, last.guided)
        except Exception as broken:
            self._fail_alone(last, broken)
            return
        last.swapped, last.step = swapped, self._step_of(last)
        self.state.release_self_pages(last.table_idx)
        self._leave(last)
        last.state = State.SWAPPED
        insort(self._swapped, last, key=lambda other: other.order)
        self._emit("swapped_out", last)

    def _decode(self) -> None:
        """One step of the batch, and whatever the device reports by now."""
        if self._view is None:
            view = self._stepper.view(len(self._running), any(sequence.guided for sequence in self._running))
            view.show([sequence.table_idx for sequence in self._running])
            self._view = view
        try:
            self.device.launch(partial(self._stepper, self._view))
            self._steps += 1
            self._unreported += 1
            if self.hooks is not None and self.hooks.after_step is not None:
                numbers = tuple(sequence.number for sequence in self._running)
                self.hooks.after_step(step_tensors(self._view), numbers)
            if self._unreported >= self.device.poll_every:
                self._launched.append(self._polling.send(list(self._running)))
                self._unreported = 0
            else:
                self._launched.append(self.device.event())
        except Exception as error:
            self.state.reset_scratch()
            self._polling.forget()
            self._launched.clear()
            self._unreported = 0
            broken = out_of_memory(error) or StepFailed(f"a decode step failed: {type(error).__name__}: {error}")
            broken.__cause__ = error
            for sequence in list(self._running):
                self._end(sequence, "failed", broken)
            return
        self._read_reports()

    def _hear(self, report: Report) -> None:
        """Read a report on the sequences that still run."""
        wrong, frame = np.count_nonzero(report.status) > 0, max(self.model.config.delay_pattern) + 2
        latest, steps, finished = report.latest, report.step.tolist(), report.finished.tolist()
        running, told = State.RUNNING, self.on_event is not None
        for batch_idx, sequence in enumerate(report.sequences):
            if sequence.state is not running:
                continue
            if wrong and self._is_wrong(sequence, report, batch_idx):
                continue
            step, before = steps[batch_idx], sequence.received
            if step == before + 1:  # mostly
                sequence.codes[before] = latest[batch_idx]  # type: ignore[index]
                sequence.received = step
            elif step > before:
                sequence.receive(report.recent[batch_idx], step)
            if told and before < sequence.plan.first + frame <= step:
                self._emit("first_frame", sequence)
            if finished[batch_idx]:
                self._finish(sequence, int(report.eos_step[batch_idx]))

    def _is_wrong(self, sequence: Sequence, report: Report, batch_idx: int) -> bool:
        """End a sequence whose numbers are wrong; tell if it was."""
        status = report.status[batch_idx]
        if not status.any():
            return False
        failure = batch_rows.failure(self.model.config, int(report.eos_step[batch_idx]), status, sequence.plan)
        if failure is not None:
            self._end(sequence, "failed", failure)
        return failure is not None

    # Leaving

    def _finish(self, sequence: Sequence, eos_step: int) -> None:
        assert sequence.codes is not None
        codes = sequence.codes[: sequence.received]
        generation = batch_rows.collect(self.model.config, codes, eos_step, sequence.plan)
        self._drop(sequence)
        sequence.end("done", generation)
        self._live.pop(sequence.number, None)
        self._emit("ended", sequence, "done")

    def _end(self, sequence: Sequence, outcome: str, error: BaseException | None = None) -> None:
        """End a sequence that has not ended, wherever it is."""
        if sequence.done:
            return
        self._drop(sequence)
        sequence.end("cancelled" if outcome == "cancelled" else "failed", error=error)
        self._live.pop(sequence.number, None)
        self._emit("ended", sequence, "deadline" if isinstance(error, DeadlineExceeded) else outcome)

    def _fail_alone(self, sequence: Sequence, error: Exception) -> None:
        """End one that broke while it was outside of the batch, or being put into it; nobody else notices."""
        self.state.repair()
        self._end(sequence, "failed", out_of_memory(error) or error)

    def _drop(self, sequence: Sequence) -> None:
        """Take a sequence out of its container and give back all it holds."""
        if sequence.state is State.WAITING:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        elif sequence.state is State.SWAPPED:
            self._swapped.remove(sequence)
        elif sequence.state is State.RUNNING:
            self._leave(sequence)
        elif sequence is self._newcomer:
            self._newcomer = None
        sequence.prefill = sequence.swapped = None
        if sequence.table_idx >= 0:
            self.state.release(sequence.table_idx)
            self._free_table_idxs.append(sequence.table_idx)
            sequence.table_idx = -1

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch; the last one moves up, so that indices in use stay together."""
        batch_idx, last = self._running.index(sequence), len(self._running) - 1
        if batch_idx < last:
            self.state.move(last, batch_idx)
            self._running[batch_idx] = self._running[last]
        else:
            self.state.clear(batch_idx)
        self._running.pop()
        self._view = None


def _drive(engine: "weakref.ref[Engine]", wake: threading.Event, stop: threading.Event) -> None:
    """Make an engine's steps while there is work, and wait while there is none, until it is stopped or gone."""
    while not stop.is_set():
        running = engine()
        if running is None:
            return
        wake.clear()
        pause = running._pause() if running.step() else math.inf
        del running
        if pause > 0:
            wake.wait(None if pause == math.inf else pause)


def _end(driver: threading.Thread, wake: threading.Event, stop: threading.Event) -> None:
    stop.set()
    wake.set()
    _join(driver, timeout=10)


def _join(driver: threading.Thread | None, timeout: float | None = None) -> None:
    """Wait for the end of a thread, unless it never began (an interruption) or is the caller's own."""
    if driver is not None and driver.is_alive() and driver is not threading.current_thread():
        driver.join(timeout)
