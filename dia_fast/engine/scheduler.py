"""Continuous batching: requests join and leave between the steps of one batch."""

import os
import threading
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from dia_fast.ambient import isolated
from dia_fast.engine import slots
from dia_fast.engine.handle import Handle
from dia_fast.engine.request import Request, plan
from dia_fast.engine.run import Run
from dia_fast.engine.sizing import sizes_for_any
from dia_fast.engine.stepper import Capture, Stepper, choose_capture
from dia_fast.engine.watch import Watch
from dia_fast.errors import DiaFastError, InputError, OutOfPages
from dia_fast.model import DiaModel
from dia_fast.state import DecodeState, Sizes
from dia_fast.utils.forks import OneProcess, renew_in_child

MAX_BATCH = 32  # requests; the kernels take two rows for each and at most 64


class StepFailed(DiaFastError, RuntimeError):
    """A decode step broke off, and with it every request that was running. Its cause is in `__cause__`."""


@dataclass(frozen=True)
class Stats:
    """An engine at one moment.

    waiting, running, parked: requests not started, in the batch, and set aside for lack of pages; steps: decode steps
    since the engine was made; pages, text_pages: in use; page_bytes: bytes of all of them; peak_bytes: the most there
    were after a step; total_bytes: bytes of the pools.
    """

    waiting: int
    running: int
    parked: int
    steps: int
    pages: int
    text_pages: int
    page_bytes: int
    peak_bytes: int
    total_bytes: int


class Engine(OneProcess):
    """Runs many requests as one batch. `submit` them, then wait for their handles, or call `step` until it says False.

    There is no thread of its own: whoever waits makes the steps, and several threads may wait at once. A request's
    codes depend on the request alone, never on what runs beside it.

    model: with its weights. max_batch: most requests at once, 1 to 32; more wait their turn, first come, first served.
    memory: bytes for pages of keys and values; by default as much as `max_batch` requests could need, at most half of
    what is free. A request takes pages as it grows. When none are left, the request submitted last is set aside on the
    host until there are, with nothing lost. prefill_rows: how many rows of text and prompt of newcomers are computed
    between two steps of those that run, at least one piece (128 rows, or one text). capture: what makes a graph of a
    step: by default CUDA graphs, for Triton kernels on a GPU; None for none. sizes: instead of memory and max_batch.
    Raises InputError for arguments that cannot be.
    """

    @isolated()
    def __init__(
        self,
        model: DiaModel,
        *,
        max_batch: int = MAX_BATCH,
        memory: int | None = None,
        prefill_rows: int = 256,
        capture: Capture | str | None = "auto",
        sizes: Sizes | None = None,
    ) -> None:
        if not 1 <= max_batch <= MAX_BATCH:
            raise InputError(f"max_batch must be from 1 to {MAX_BATCH}, not {max_batch}")
        if prefill_rows < 1:
            raise InputError(f"prefill_rows must be at least 1, not {prefill_rows}")
        self.model, self.prefill_rows = model, prefill_rows
        self._process = os.getpid()
        self._renew()
        renew_in_child(self)
        self._cancelled = list[Handle]()
        self._device = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
        if sizes is None:
            sizes = sizes_for_any(model.config, max_batch, memory, model.dtype, model.device)
        self.state = DecodeState(model.config, model.ops, sizes, model.dtype, model.device)
        self._stepper = Stepper(model, self.state, choose_capture(capture, model))
        with self._device:
            self._stepper.warm_up()
        self._watch = Watch(model.device)
        self._waiting: deque[Run] = deque()
        self._newcomer: Run | None = None
        self._running: list[Run] = []  # in the order of their slots
        self._parked: list[Run] = []  # the oldest first
        self._lanes = list(reversed(range(sizes.batch)))
        self._shown: tuple[DecodeState, list[int]] | None = None
        self._submitted = self._steps = self._peak = 0

    def _renew(self) -> None:
        """In a new process: locks of its own. The requests are left to the parent."""
        self.lock = threading.RLock()
        self._turn, self._led, self._busy = threading.Condition(), False, False

    @property
    def _ours(self) -> bool:
        return self._process == os.getpid()

    def _check_process(self) -> None:
        if not self._ours:
            raise InputError("this engine was made before the process was forked: make another one in the child")

    @isolated()
    def submit(self, request: Request, *, stream: bool = False) -> Handle:
        """Queues a request. stream: whether `Handle.frames` will be used.

        Raises InputError for a request that the model cannot take, OutOfPages for one that could never begin.
        """
        self._check_process()
        item = plan(self.model.config, request)
        sizes, state = self.state.sizes, self.state
        if item.guided and not state.guided:
            raise InputError("guidance_scale: this engine was made for requests without guidance")
        if item.end + 1 > sizes.rows or len(request.text_ids) > sizes.text:
            raise InputError(f"this engine was made for {sizes.rows} rows and {sizes.text} bytes of text at most")
        needs = (self._pages_to_start(item.first, item.guided), state.cross_pool.shape.pages(len(request.text_ids)))
        if needs[0] > sizes.pages or needs[1] > sizes.text_pages:
            raise OutOfPages(
                f"the request needs {needs[0]} pages and {needs[1]} of text to begin, and the cache has {sizes.pages} "
                f"and {sizes.text_pages}; give the engine more memory, or shorten the text or the prompt"
            )
        handle = Handle(self, request, item.first, stream)
        with self.lock:
            self._waiting.append(Run(handle, item, self._submitted, stream))
            self._submitted += 1
        return handle

    @isolated()
    def step(self) -> bool:
        """A bounded piece of work: some prefill for a newcomer, then one decode step of all that run.

        Returns whether there is work left. What goes wrong ends up in the handles of those it concerns: one request, or
        all that were in the step. Only an interruption (Ctrl-C) is raised, after every request that had begun has
        failed; the engine can be used again.
        """
        self._check_process()
        with self.lock, self._device:
            self._busy = True
            try:
                self._admit()
                self._make_room()
                if self._running:
                    self._decode()
            except BaseException as error:
                self._abandon(error)
                raise
            finally:
                self._busy = False
                self._sweep()
            return bool(self._running or self._waiting or self._newcomer or self._parked)

    def advance(self) -> None:
        """One `step`, or the wait for the end of the one that another thread makes: what waiting for a handle is.

        So every thread that waits looks at its handle after every step, whoever made it.
        """
        leads = False
        try:
            with self._turn:
                if self._led:
                    self._turn.wait()
                    return
                leads = self._led = True
            self.step()
        finally:
            if leads:
                with self._turn:
                    self._led = False
                    self._turn.notify_all()

    def cancel(self, handle: Handle) -> None:
        """Ends a request as `Handle.cancel` does."""
        if not self._ours:
            return
        with self.lock:
            self._cancelled.append(handle)
            # Busy is this very thread: the garbage collector can come in anywhere and end whoever holds a handle.
            if not self._busy:
                self._sweep()

    def close(self) -> None:
        """Cancels everything that is not done."""
        with self.lock:
            for run in [*self._waiting, *self._parked, *self._running, *filter(None, [self._newcomer])]:
                self.cancel(run.handle)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def steps(self) -> int:
        """Decode steps since the engine was made; `stats` would wait for the one under way."""
        return self._steps

    @property
    def stats(self) -> Stats:
        with self.lock:
            state = self.state
            newcomers = 1 if self._newcomer else 0
            return Stats(
                waiting=len(self._waiting) + newcomers,
                running=len(self._running),
                parked=len(self._parked),
                steps=self._steps,
                pages=state.pool.pages - state.pool.free,
                text_pages=state.cross_pool.pages - state.cross_pool.free,
                page_bytes=self._bytes(state.pool.free, state.cross_pool.free),
                peak_bytes=self._peak,
                total_bytes=self._bytes(0, 0),
            )

    def _bytes(self, free: int, text_free: int) -> int:
        """Bytes of all pages but the free ones."""
        state, dtype = self.state, self.model.dtype
        text = (state.cross_pool.pages - text_free) * state.cross_pool.shape.bytes(dtype)
        return (state.pool.pages - free) * state.pool.shape.bytes(dtype) + text

    # Joining

    def _admit(self) -> None:
        """Lets parked requests back in, then newcomers, for as much work as a step may do."""
        while self._parked and self._fits(self._parked[0]):
            back = self._parked.pop(0)
            assert back.parked is not None
            slots.unpark(self.state, len(self._running), back.lane, back.guided, back.parked)
            back.parked = None
            self._running.append(back)
        spent = 0
        while (run := self._newcomer or self._next_newcomer()) is not None:
            assert run.prefill is not None
            try:
                spent += next(run.prefill)
            except StopIteration:
                self._newcomer = run.prefill = None
                slots.place(self.state, len(self._running), run.plan)
                run.row = run.plan.first
                self._running.append(run)
            except Exception as error:
                self._fail([run], error)
            if self._running and spent >= self.prefill_rows:
                return

    def _next_newcomer(self) -> Run | None:
        """The first waiting request, if there is a lane and there are pages for it."""
        if not self._waiting or self._parked or not self._lanes or not self._fits(self._waiting[0]):
            return None
        run = self._waiting.popleft()
        state, item = self.state, run.plan
        run.lane = self._lanes.pop()
        state.cross_blocks.grow(run.lane, len(item.request.text_ids))
        state.grow(run.lane, item.first + 1, item.guided)
        run.prefill = slots.prefill(self.model, state, run.lane, item)
        run.handle.status = "running"
        self._newcomer = run
        return run

    def _fits(self, run: Run) -> bool:
        """Whether a waiting or parked request can go on, with a page left for each row of those that run."""
        state = self.state
        if run.parked is not None and not self._running:
            return True  # it fitted before; if it cannot grow now that it is alone, it never can
        if run.parked is None and state.cross_pool.shape.pages(len(run.plan.request.text_ids)) > state.cross_pool.free:
            return False
        spare = sum(2 if other.guided else 1 for other in self._running)
        return self._pages_to_start(max(run.row, run.plan.first), run.guided) + spare <= state.pool.free

    def _pages_to_start(self, row: int, guided: bool) -> int:
        return self.state.pool.shape.pages(row + 1) * (2 if guided else 1)

    # Stepping

    def _make_room(self) -> None:
        """Pages for the next row of every running request, the oldest first; parks the youngest when there are none."""
        guided = any(run.guided for run in self._running)
        for run in sorted(self._running, key=lambda run: run.number):
            while run in self._running:
                try:
                    self._grow(run, guided)
                    break
                except OutOfPages as error:
                    self._make_way(run, error)

    def _grow(self, run: Run, guided: bool) -> None:
        """Pages for a request's next row. In a batch with guidance every one has an unconditional row, read or not."""
        if not guided and self.state.guided:
            self.state.blocks.release(self.state.unconditional(run.lane))
        self.state.grow(run.lane, run.rows_needed, guided)

    def _make_way(self, run: Run, error: OutOfPages) -> None:
        """Frees pages for `run`: those of the newcomer, or of the youngest that runs. Alone, `run` fails."""
        if self._newcomer:
            newcomer = self._newcomer
            self._drop(newcomer)
            newcomer.handle.status = "waiting"
            self._waiting.appendleft(newcomer)
            return
        youngest = max(self._running, key=lambda other: other.number)
        if len(self._running) == 1:
            self._fail([run], OutOfPages(f"the request has grown beyond the whole cache: {error}"))
            return
        youngest.parked = slots.park(self.state, self._running.index(youngest), youngest.lane, youngest.guided)
        self._leave(youngest)
        self._parked.append(youngest)
        self._parked.sort(key=lambda run: run.number)

    def _decode(self) -> None:
        """One step of the batch, and whatever the device reports by now."""
        guided = any(run.guided for run in self._running)
        view = self._stepper.view(len(self._running), guided)
        lanes = [run.lane for run in self._running]
        if self._shown is None or self._shown[0] is not view or self._shown[1] != lanes:
            view.show(lanes)
            self._shown = view, lanes
        try:
            self._stepper(view)
            self._steps += 1
            for run in self._running:
                run.row += 1
            seen = self._watch.after_step(view, self._running)
        except Exception as error:
            self.state.reset_scratch()
            self._watch.forget()
            broken = StepFailed(f"a decode step failed: {type(error).__name__}: {error}")
            broken.__cause__ = error
            self._fail(list(self._running), broken)
            return
        self._peak = max(self._peak, self._bytes(self.state.pool.free, self.state.cross_pool.free))
        for item in seen:
            if item.status is not None and item.run in self._running:
                slot = self._running.index(item.run)
                failure = slots.failure(self.model.config, self.state, slot, item.status, item.run.plan)
                if failure is not None:
                    self._fail([item.run], failure)
                    continue
            if item.rows is not None:
                item.run.handle._receive(item.rows)
            if item.finished and item.run in self._running:
                self._finish(item.run)

    # Leaving

    def _sweep(self) -> None:
        """Ends the requests that have been cancelled."""
        self._busy = True
        try:
            while self._cancelled:
                handle = self._cancelled.pop()
                for run in [*self._waiting, *self._parked, *self._running, *filter(None, [self._newcomer])]:
                    if run.handle is handle:
                        self._drop(run)
                        handle.status = "cancelled"
        finally:
            self._busy = False

    def _finish(self, run: Run) -> None:
        run.handle._generation = slots.collect(self.model.config, self.state, self._running.index(run), run.plan)
        self._drop(run)
        run.handle.status = "done"

    def _fail(self, runs: list[Run], error: Exception) -> None:
        for run in runs:
            self._drop(run)
            run.handle.error = error
            run.handle.status = "failed"

    def _abandon(self, cause: BaseException) -> None:
        """After an interruption anywhere: fails all that has begun, and starts over with every page and slot free."""
        error = StepFailed(f"interrupted by {type(cause).__name__}")
        error.__cause__ = cause
        for run in [*self._running, *self._parked, *filter(None, [self._newcomer])]:
            run.prefill = run.parked = None
            run.handle.error = error
            run.handle.status = "failed"
        self._running, self._parked, self._newcomer, self._shown = [], [], None, None
        self._lanes = list(reversed(range(self.state.capacity)))
        self._watch.forget()
        self.state.reset()

    def _drop(self, run: Run) -> None:
        """Takes a request out of wherever it is and gives back all it holds."""
        if run in self._waiting:
            self._waiting.remove(run)
        if run in self._parked:
            self._parked.remove(run)
        if run is self._newcomer:
            self._newcomer = None
        if run in self._running:
            self._leave(run)
        run.prefill = run.parked = None
        if run.lane >= 0:
            self.state.release(run.lane)
            self._lanes.append(run.lane)
            run.lane = -1

    def _leave(self, run: Run) -> None:
        """Frees the slot of a request; the last one moves up, so that slots in use stay together."""
        slot, last = self._running.index(run), len(self._running) - 1
        if slot < last:
            self.state.move(last, slot)
            self._running[slot] = self._running[last]
        else:
            self.state.clear(slot)
        self._running.pop()
