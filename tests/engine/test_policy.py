"""The order of service: limits, priorities, deadlines, fairness, and what listeners are told."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_fast.engine import (
    DeadlineExceeded,
    Engine,
    EngineEvent,
    EngineFull,
    Handle,
    Request,
    memory,
    scheduler,
)
from dia_fast.errors import InputError
from dia_fast.model.decode_state import Sizes
from tests.helpers.cheap_model import BAD, CheapModel, alone_cheaply
from tests.helpers.schedules import CHANNELS, POSITIONS, assert_same, assert_sound, run_to_end
from tests.helpers.virtual_device import VirtualDevice


def engine_of(batch: int = 2, pages: int = 40, **named: Any) -> Engine:
    model: Any = CheapModel(ends=False)
    return Engine(model, sizes=Sizes(batch, True, POSITIONS + 1, 64, pages, 2 * batch), **named)


def request(number: int, frames: int = 0, most: int = 8, guidance: float | None = 3.0) -> Request:
    prompt = torch.full((frames, CHANNELS), number % 30) if frames else None
    return Request([1 + number % 200], prompt, most, guidance_scale=guidance, seed=number)


def order_of_ends(engine: Engine, handles: list[Handle]) -> list[int]:
    ended: list[int] = []
    for _ in range(20_000):
        busy = engine.step()
        ended += [index for index, handle in enumerate(handles) if handle.done and index not in ended]
        if not busy:
            return ended
    raise AssertionError("no end")


def test_as_many_wait_as_may_and_not_one_more() -> None:
    engine = engine_of(batch=2, max_waiting=3)
    handles = [engine.submit(request(number)) for number in range(5)]  # two of them can start at once
    with pytest.raises(EngineFull, match="3 requests wait already, and max_waiting is 3; try later"):
        engine.submit(request(5))
    handles[4].cancel()
    handles.append(engine.submit(request(5)))
    with pytest.raises(EngineFull):
        engine.submit(request(6))
    engine.step()
    with pytest.raises(EngineFull):
        engine.submit(request(6))
    run_to_end(engine)
    for number, handle in enumerate(handles):
        if number != 4:
            assert_same(handle.result(), alone_cheaply(request(number), ends=False))


def test_with_none_waiting_only_what_starts_at_once_is_taken() -> None:
    engine = engine_of(batch=2, max_waiting=0)
    first = engine.submit(request(0)), engine.submit(request(1))
    with pytest.raises(EngineFull):
        engine.submit(request(2))
    run_to_end(engine)
    engine.submit(request(2)).result()
    assert all(handle.status == "done" for handle in first)


@pytest.mark.parametrize("max_waiting", [-1, 1.5, "many"])
def test_a_limit_that_is_none(max_waiting: Any) -> None:
    with pytest.raises(InputError, match="max_waiting"):
        engine_of(max_waiting=max_waiting)


def test_lower_priorities_go_first_and_equals_in_their_order() -> None:
    engine = engine_of(batch=1)
    wanted = [5, 0, 5, -3, 0]
    handles = [engine.submit(request(number), priority=priority) for number, priority in enumerate(wanted)]
    assert order_of_ends(engine, handles) == [3, 1, 4, 0, 2]


def test_who_is_last_in_line_makes_way_for_one_of_higher_priority() -> None:
    """Both want ten pages, and there are fourteen: the one submitted first has the lower priority."""
    told: list[EngineEvent] = []
    engine = engine_of(pages=14, on_event=told.append)
    late = engine.submit(request(0, most=120), priority=1)
    first = engine.submit(request(1, most=120))
    assert order_of_ends(engine, [late, first]) == [1, 0]
    assert {event.number for event in told if event.kind == "swapped_out"} == {0}
    assert_same(late.result(), alone_cheaply(request(0, most=120), ends=False))


def test_one_that_needs_many_pages_is_passed_and_not_for_ever() -> None:
    """Small requests come without end. One that wants most of the cache is let in after `MAX_PASSED` of them."""
    started: list[int] = []
    engine = engine_of(
        batch=3, pages=12, on_event=lambda it: started.append(it.number) if it.kind == "started" else None
    )
    engine.submit(request(0, most=60))
    engine.step()
    large = engine.submit(request(1, frames=130, most=4))  # 10 pages
    for number in range(2, 40):
        engine.submit(request(number, most=6 + number % 3))
    run_to_end(engine)
    place = started.index(1)
    passed = [number for number in started[:place] if number > 1]
    assert passed == list(range(2, 2 + scheduler.MAX_PASSED))
    assert_same(large.result(), alone_cheaply(request(1, frames=130, most=4), ends=False))


def test_nobody_waits_much_longer_than_others_of_the_same_kind() -> None:
    """Forty requests of all sizes: they start in their order, but for the few that a large one lets pass."""
    started: list[int] = []
    engine = engine_of(
        batch=4, pages=16, on_event=lambda it: started.append(it.number) if it.kind == "started" else None
    )
    for number in range(40):
        engine.submit(request(number, frames=[0, 0, 3, 70, 110][number % 5], most=5 + number % 25))
    run_to_end(engine)
    assert sorted(started) == list(range(40))
    late = [started.index(number) - number for number in range(40)]
    assert max(late) <= scheduler.MAX_PASSED


@pytest.mark.parametrize("where", ["waiting", "prefilling", "running", "swapped"])
def test_a_deadline_holds_wherever_the_request_is(where: str) -> None:
    device = VirtualDevice(1e-3)
    batch, pages = 2 if where in ("swapped", "prefilling") else 1, 10 if where == "swapped" else 14
    engine = engine_of(batch, pages, prefill_tokens=1, device=device)
    other = None if where == "running" else engine.submit(request(0, most=100), priority=-1)
    frames = 130 if where == "prefilling" else 0
    if where == "prefilling":
        engine.step()
    seconds = {"waiting": 0.02, "prefilling": 0.0015, "running": 0.02, "swapped": 0.075}[where]
    handle = engine.submit(request(1, frames, most=9 if frames else 120), deadline=seconds)
    seen = set()
    while not handle.done:
        seen.add(handle._sequence.state.name.lower())
        engine.step()
    assert where in seen
    assert seconds <= device.clock <= seconds + 5e-3
    with pytest.raises(DeadlineExceeded, match=f"not done after {seconds:g} s"):
        handle.result()
    run_to_end(engine)
    assert_sound(engine)
    assert engine.stats.pages == 0
    if other is not None:
        assert_same(other.result(), alone_cheaply(request(0, most=100), ends=False))


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), "soon"])
def test_a_deadline_that_is_none(deadline: Any) -> None:
    engine = engine_of()
    with pytest.raises(InputError, match="deadline must be a number"):
        engine.submit(request(0), deadline=deadline)
    assert not engine.step()


def test_a_result_is_waited_for_so_long_and_goes_on() -> None:
    engine = engine_of()
    handle = engine.submit(request(0, most=60))
    with pytest.raises(TimeoutError, match="not done after 0 s; it goes on"):
        handle.result(timeout=0)
    assert handle.status == "waiting"
    with pytest.raises(TimeoutError, match="not done after 1e-06 s"):
        handle.result(timeout=1e-6)
    assert_same(handle.result(timeout=60), alone_cheaply(request(0, most=60), ends=False))
    assert_same(handle.result(timeout=0), handle.result())


def test_a_timeout_holds_while_another_thread_makes_the_steps() -> None:
    engine = engine_of()
    handle = engine.submit(request(0))
    with engine.lock:  # as a step that takes its time
        with pytest.raises(TimeoutError):
            handle.result(timeout=0.02)
    assert handle.result(timeout=60).frames.shape[1] == CHANNELS


def test_listeners_are_told_each_thing_once_with_counts_and_times() -> None:
    told: list[EngineEvent] = []
    device = VirtualDevice(1e-3)
    engine = engine_of(batch=2, pages=14, on_event=told.append, device=device)
    handles = [engine.submit(request(number, most=120)) for number in range(2)]
    handles.append(engine.submit(request(2), deadline=1e-3))
    handles.append(engine.submit(request(3)))
    handles[3].cancel()
    handles.append(engine.submit(request(BAD)))
    run_to_end(engine)
    ends = {event.number: event for event in told if event.kind == "ended"}
    assert [ends[number].reason for number in range(5)] == ["done", "done", "deadline", "cancelled", "failed"]
    for number in (0, 1):
        kinds = [event.kind for event in told if event.number == number]
        assert Counter(kinds)["first_frame"] == 1
        assert kinds[:3] == ["queued", "started", "first_frame"] and kinds[-1] == "ended"
        assert kinds[3:-1] == (["swapped_out", "swapped_in"] * (len(kinds[3:-1]) // 2))
        assert ends[number].frames == len(handles[number].result().frames)
        assert ends[number].steps == len(handles[number].result().delayed_codes)
    assert any(event.kind == "swapped_out" for event in told)
    seconds = [(event.number, event.seconds) for event in told]
    assert all(second >= 0 for _, second in seconds)
    assert all(
        [s for n, s in seconds if n == number] == sorted(s for n, s in seconds if n == number) for number in range(5)
    )
    first = next(event for event in told if event.kind == "first_frame" and event.number == 0)
    assert first.frames == 1 or first.frames == 2
    assert first.seconds <= 12e-3  # row 4 completes frame 0, and is reported within two steps


def test_a_listener_that_fails_does_no_harm() -> None:
    def fail(event: EngineEvent) -> None:
        raise ArithmeticError("planted")

    engine = engine_of(on_event=fail)
    with pytest.warns(RuntimeWarning, match="on_event raised ArithmeticError: planted"):
        handle = engine.submit(request(0))
        run_to_end(engine)
    assert_same(handle.result(), alone_cheaply(request(0), ends=False))


def test_one_without_guidance_that_joins_guided_ones_is_not_swapped_to_and_fro() -> None:
    """It takes a page for the unconditional row that nobody reads, and that page is counted before it is let in."""
    told: list[EngineEvent] = []
    engine = engine_of(batch=3, pages=7, on_event=told.append)
    guided = engine.submit(request(0, frames=30, most=40))
    alone = engine.submit(request(1, frames=30, most=40, guidance=None))
    run_to_end(engine)
    swaps = sum(event.kind == "swapped_out" for event in told)
    assert swaps <= 1
    assert_same(guided.result(), alone_cheaply(request(0, frames=30, most=40), ends=False))
    assert_same(alone.result(), alone_cheaply(request(1, frames=30, most=40, guidance=None), ends=False))


def test_memory_that_the_system_would_give_back_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 100 kB\nMemFree:  9 kB\nMemAvailable:   60 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", str(told))
    assert memory.free_memory(torch.device("cpu")) == 60 * 1024
    for contents in ("", "MemTotal 9", "MemAvailable: many kB\n"):
        told.write_text(contents)
        assert memory.free_memory(torch.device("cpu")) > 0


def test_what_torch_holds_of_a_gpu_without_using_it_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory.free_memory(torch.device("cuda", 0)) == 1400


@pytest.mark.parametrize("driven", [False, True])
def test_many_threads_submit_and_none_waits_for_a_step(driven: bool) -> None:
    """A step that takes a second holds nobody up who submits, cancels or asks for numbers."""
    engine = engine_of()
    if driven:
        engine.start()
    entered, leave = threading.Event(), threading.Event()
    model: Any = engine.model
    real = model.decode_step

    def slow(state: Any) -> None:
        entered.set()
        assert leave.wait(20)
        real(state)

    model.decode_step = slow
    first = engine.submit(request(0))
    if not driven:
        maker = threading.Thread(target=first.result)
        maker.start()
    assert entered.wait(20)
    others = [engine.submit(request(number)) for number in range(1, 4)]
    others[2].cancel()
    assert engine.stats.waiting >= 2
    leave.set()
    assert [handle.result(timeout=60).frames.shape[1] for handle in (first, *others[:2])] == [CHANNELS] * 3
    assert others[2].status == "cancelled"
    engine.close()
