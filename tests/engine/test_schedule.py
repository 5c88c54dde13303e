"""Requests join, leave, are cancelled and set aside in any order: nobody's codes change and no page goes astray."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dia_fast.engine import Cancelled, Engine, Handle, Request, StepFailed
from dia_fast.errors import InputError, OutOfPages
from dia_fast.model.decode_state import Sizes, cross_pages, self_pages
from tests.helpers.schedules import (
    POSITIONS,
    alone,
    assert_same,
    assert_sound,
    numbered_request,
    run_to_end,
    small_config,
    small_model,
)


def small_sizes(batch: int = 3, pages: int = 20, text_pages: int = 9) -> Sizes:
    """Too few pages for `batch` long requests: 140 rows with guidance take 10."""
    return Sizes(batch, True, POSITIONS + 1, 128, pages, text_pages)


def poison(engine: Engine) -> None:
    """Set every page that nobody holds or keeps to NaN: reading one after its release, or unwritten, shows."""
    state = engine.state
    for blocks in (state.blocks, state.cross_blocks):
        free = torch.tensor(sorted(blocks.pool._free), dtype=torch.int64)
        for layer in blocks.pool.keys + blocks.pool.values:
            layer[free] = torch.nan


class Schedule(RuleBasedStateMachine):
    """submit, step, cancel, fail, finish: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(small_model(), sizes=small_sizes(), prefill_tokens=40)
        poison(self.engine)
        self.live: dict[Handle, int] = {}
        self.broken: set[Handle] = set()

    @rule(number=st.integers(0, 30), stream=st.booleans())
    def submit(self, number: int, stream: bool) -> None:
        self.live[self.engine.submit(numbered_request(number), stream=stream)] = number

    @rule(times=st.integers(1, 20))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()
            poison(self.engine)
            assert_sound(self.engine)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(list(self.live)))
        over = handle.done
        handle.cancel()
        assert handle.status == "cancelled" or over
        poison(self.engine)

    @precondition(lambda self: self.engine._newcomer is not None or self.engine._waiting)
    @rule()
    def fail_in_prefill(self) -> None:
        """The next piece of prefill raises, whoever's it is."""
        model = self.engine.model
        before = {handle for handle in self.live if handle.status == "failed"}

        def broken(*args: Any) -> None:
            raise ArithmeticError("planted")

        model.store_text = broken
        try:
            self.engine.step()
        finally:
            del model.store_text
        poison(self.engine)
        for handle in {handle for handle in self.live if handle.status == "failed"} - before:
            assert isinstance(handle.error, ArithmeticError)
            self.broken.add(handle)

    @precondition(lambda self: self.engine._running)
    @rule()
    def fail_in_step(self) -> None:
        """The next decode step raises: all that are in it end, and nobody else."""
        model = self.engine.model

        def broken(*args: Any) -> None:
            raise ArithmeticError("planted")

        model.decode_step = broken
        try:
            self.engine.step()
        finally:
            del model.decode_step
        poison(self.engine)
        assert not self.engine._running
        self.broken |= {handle for handle in self.live if isinstance(handle.error, StepFailed)}

    @invariant()
    def pages_are_accounted_for(self) -> None:
        assert_sound(self.engine)

    def teardown(self) -> None:
        for _ in range(5000):
            if not self.engine.step():
                break
        assert_sound(self.engine)
        stats = self.engine.stats
        assert (stats.pages, stats.text_pages, stats.waiting, stats.running, stats.swapped) == (0, 0, 0, 0, 0)
        for handle, number in self.live.items():
            assert handle.done
            if handle.status == "done":
                assert_same(handle.result(), alone(number))
            elif handle.status == "failed":
                assert handle in self.broken


Schedule.TestCase.settings = settings(
    max_examples=15, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedule = Schedule.TestCase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_the_same_alone_batched_late_streamed_and_beside_a_cancelled_one(dtype: torch.dtype) -> None:
    """Thirty requests of every kind through a batch of four."""
    engine = Engine(small_model(dtype), max_batch=4)
    handles = [engine.submit(numbered_request(number), stream=number % 3 == 0) for number in range(20)]
    for step in range(15):
        engine.step()
        if step == 6:
            handles[1].cancel()
    late = [engine.submit(numbered_request(number)) for number in range(20, 30)]
    streamed = torch.cat(list(handles[6].frames()))
    run_to_end(engine)
    for number, handle in enumerate(handles + late):
        if number == 1:
            assert handle.status == "cancelled"
        else:
            assert_same(handle.result(), alone(number, dtype=dtype))
    assert len(streamed) > 5 and torch.equal(streamed, alone(6, dtype=dtype).frames)


def test_frames_come_as_soon_as_they_are_complete() -> None:
    engine = Engine(small_model(eos=0.0), max_batch=2)
    request = numbered_request(0, max_new_tokens=40)
    handle = engine.submit(request, stream=True)
    pieces = []
    for piece in handle.frames():
        pieces.append(piece)
        # Row r completes frame r - 1 - max(delay); one row is formed in a step, the first of them in the first.
        assert sum(map(len, pieces)) == max(engine.stats.steps - 1 - 3, 0) or handle.done
    assert len(pieces) > 30
    assert torch.equal(torch.cat(pieces), handle.result().frames)


def test_the_youngest_is_set_aside_when_pages_run_out_and_comes_back_unharmed() -> None:
    """Three requests of 100 rows want 24 pages and there are 14."""
    engine = Engine(small_model(eos=0.0), sizes=small_sizes(pages=14))
    requests = [Request([5, number], None, 100, temperature=number, seed=number) for number in range(3)]
    expected = [Engine(small_model(eos=0.0), max_batch=1).submit(request).result() for request in requests]
    handles = [engine.submit(request) for request in requests]
    most = 0
    while engine.step():
        poison(engine)
        assert_sound(engine)
        most = max(most, engine.stats.swapped)
        assert handles[0].done or engine.stats.steps < 2 or handles[0]._sequence in engine._running
    assert most > 0
    for handle, result in zip(handles, expected, strict=True):
        assert_same(handle.result(), result)


def test_a_request_that_outgrows_the_whole_cache_fails_and_says_so() -> None:
    engine = Engine(small_model(eos=0.0), sizes=small_sizes(pages=4))
    small = Request([1, 2, 3], None, 20, seed=1)
    handle, other = engine.submit(Request([1, 2], None, 100, seed=1)), engine.submit(small)
    run_to_end(engine)
    assert handle.status == "failed" and isinstance(handle.error, OutOfPages)
    with pytest.raises(OutOfPages, match="has grown beyond the whole cache: .* 4 are free; .*make the cache larger"):
        handle.result()
    assert_same(other.result(), Engine(small_model(eos=0.0), max_batch=1).submit(small).result())
    assert engine.stats.pages == 0


def test_what_can_never_begin_is_refused_at_once() -> None:
    engine = Engine(small_model(), sizes=small_sizes(pages=2, text_pages=1))
    prompt = torch.zeros(40, 3, dtype=torch.int64)
    with pytest.raises(OutOfPages, match="needs 4 pages and 1 of text to begin, and the cache has 2 and 1"):
        engine.submit(Request([1], prompt, 5))
    with pytest.raises(OutOfPages, match="2 of text"):
        engine.submit(Request([1] * 33, None, 5))
    assert engine.stats.waiting == 0


def test_requests_are_served_in_the_order_they_came() -> None:
    engine = Engine(small_model(eos=0.0), max_batch=2)
    handles = [engine.submit(Request([1], None, 10, seed=number)) for number in range(7)]
    ended: list[int] = []
    while engine.step():
        ended += [number for number, handle in enumerate(handles) if handle.done and number not in ended]
    assert ended == list(range(6)) or ended == list(range(7))
    assert all(handle.status == "done" for handle in handles)


def test_a_newcomer_does_not_stall_those_that_run() -> None:
    """A prompt of 139 rows is computed in pieces of at most 128; between two of them everybody makes a step."""
    engine = Engine(small_model(eos=0.0), max_batch=3, prefill_tokens=1)
    running = engine.submit(numbered_request(0, max_new_tokens=60))
    while running.status != "running" or not engine.stats.running:
        engine.step()
    prompt = torch.zeros(135, 3, dtype=torch.int64)
    request = Request([1] * 60, prompt, 4, guidance_scale=None, seed=0)
    newcomer = engine.submit(request)
    steps = engine.stats.steps
    calls = []
    while engine.stats.running < 2:
        engine.step()
        calls.append(engine.stats.steps - steps)
    assert calls == [1, 2, 3, 4] or calls == [1, 2, 3]  # text, 128 rows, 7 rows, one step in each call
    run_to_end(engine)
    assert_same(newcomer.result(), Engine(small_model(eos=0.0), max_batch=1).submit(request).result())


def test_memory_follows_the_pages_in_use() -> None:
    engine = Engine(small_model(eos=0.0), max_batch=1)
    handle = engine.submit(Request([1] * 5, None, 139, seed=0))
    sound, text = self_pages(small_config()), cross_pages(small_config())
    while engine.step():
        steps = engine._step_of(engine._running[0]) if engine._running else 0
        if steps:
            assert engine.stats.pages == 2 * sound.pages(steps)
            used = engine.stats.pages * sound.bytes(torch.float32) + text.bytes(torch.float32)
            assert engine.stats.page_bytes == used
    assert handle.status == "done"
    assert engine.stats.page_bytes == 0 and engine.stats.peak_bytes >= 2 * 5 * sound.bytes(torch.float32)


def test_a_cancelled_request_says_so() -> None:
    engine = Engine(small_model(), max_batch=1)
    handles = [engine.submit(numbered_request(number)) for number in range(2)]
    engine.step()
    for handle in handles:
        handle.cancel()
        with pytest.raises(Cancelled, match="was cancelled"):
            handle.result()
    assert not engine.step() and engine.stats.pages == 0
    with Engine(small_model(), max_batch=1) as closing:
        left = closing.submit(numbered_request(0))
    assert left.status == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch": 0}, "max_batch must be from 1 to 32, not 0"),
        ({"max_batch": 33}, "max_batch must be from 1 to 32, not 33"),
        ({"prefill_tokens": 0}, "prefill_tokens must be at least 1"),
        ({"memory": 1000}, "memory: 1000 bytes hold no request; give at least"),
        ({"capture": "always"}, "capture must be"),
    ],
)
def test_engines_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(small_model(), **arguments)


def test_a_budget_of_memory_is_kept() -> None:
    for memory in (400_000, 1_000_000, 10**9):
        engine = Engine(small_model(), max_batch=4, memory=memory)
        assert engine.stats.total_bytes <= memory
        handle = engine.submit(numbered_request(0))
        run_to_end(engine)
        assert_same(handle.result(), alone(0))
