"""A fault in one request, or in a step, ends what it must and nothing else; memory comes back."""

import gc
import resource
import threading
from typing import Any

import pytest
import torch

from dia_fast.engine import Engine, Generation, Handle, StepFailed, generate
from dia_fast.model.decode_state import DecodeState
from dia_fast.model.model import DiaModel
from tests.helpers.schedules import alone, assert_same, assert_sound, numbered_request, run_to_end, small_model

LONG = [1, 6, 11, 13]  # of the numbered requests: those that run for twenty steps and more


def started(engine: Engine, numbers: list[int], steps: int = 6) -> list[Handle]:
    handles = [engine.submit(numbered_request(number)) for number in numbers]
    for _ in range(steps):
        engine.step()
    return handles


def break_step(monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str = "before") -> None:
    """The next decode step raises, before it has done anything or in its middle."""
    real = DiaModel.decode_step

    def broken(self: DiaModel, state: DecodeState) -> None:
        monkeypatch.setattr(DiaModel, "decode_step", real)
        if when == "after":
            real(self, state)
        raise error

    monkeypatch.setattr(DiaModel, "decode_step", broken)


def test_a_request_whose_prefill_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small_model(), max_batch=4)
    running = started(engine, LONG[:2])
    bad = engine.submit(numbered_request(5))

    def broken(*args: Any, **named: Any) -> None:
        raise ArithmeticError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(DiaModel, "prefill", broken)  # number 5 has a prompt
        engine.step()
    good = engine.submit(numbered_request(LONG[2]))
    run_to_end(engine)
    with pytest.raises(ArithmeticError, match="planted"):
        bad.result()
    for handle, number in zip([*running, good], LONG, strict=False):
        assert_same(handle.result(), alone(number))
    assert_sound(engine)
    assert engine.stats.pages == engine.stats.text_pages == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_in_a_step_ends_all_that_run_and_none_that_wait(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    engine = Engine(small_model(), max_batch=2)
    handles = started(engine, LONG)
    assert [handle.status for handle in handles] == ["running", "running", "waiting", "waiting"]
    break_step(monkeypatch, ArithmeticError("planted"), when)
    run_to_end(engine)
    for handle in handles[:2]:
        with pytest.raises(StepFailed, match="a decode step failed: ArithmeticError: planted") as caught:
            handle.result()
        assert isinstance(caught.value.__cause__, ArithmeticError)
    for handle, number in zip(handles[2:], LONG[2:], strict=True):
        assert_same(handle.result(), alone(number))
    assert_sound(engine)
    assert engine.stats.pages == engine.stats.text_pages == 0


@pytest.mark.parametrize("place", ["step", "prefill", "growing"])
def test_ctrl_c_comes_through_and_the_engine_can_be_used_again(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    engine = Engine(small_model(), max_batch=2)
    handles = started(engine, LONG[:3])
    if place == "step":
        break_step(monkeypatch, KeyboardInterrupt(), "after")
    else:
        target, name = (DiaModel, "prefill") if place == "prefill" else (DecodeState, "grow")
        real = getattr(target, name)

        def interrupted(*args: Any, **named: Any) -> None:
            monkeypatch.setattr(target, name, real)
            raise KeyboardInterrupt

        handles[0].cancel()  # for a newcomer, which takes pages and has a prompt
        handles[2].cancel()
        handles[2] = engine.submit(numbered_request(5))
        monkeypatch.setattr(target, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(engine)
    assert handles[1].status == "failed"
    with pytest.raises(StepFailed, match="interrupted by KeyboardInterrupt"):
        handles[1].result()
    assert_sound(engine)
    run_to_end(engine)
    assert_same(engine.submit(numbered_request(LONG[3])).result(), alone(LONG[3]))
    if place == "step":
        assert_same(handles[2].result(), alone(LONG[2]))
    assert engine.stats.pages == engine.stats.text_pages == 0


def test_generate_cancels_the_others_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small_model(), max_batch=2)
    break_step(monkeypatch, ArithmeticError("planted"))
    with pytest.raises(StepFailed, match="planted"):
        generate(small_model(), [numbered_request(number) for number in LONG], engine=engine)
    assert engine.stats.waiting == engine.stats.running == engine.stats.pages == 0
    assert_same(generate(small_model(), [numbered_request(1)], engine=engine)[0], alone(1))


def test_an_error_in_progress_leaves_nothing_running() -> None:
    engine = Engine(small_model(), max_batch=2)

    def stop(steps: int) -> None:
        if steps == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(small_model(), [numbered_request(number) for number in LONG], progress=stop, engine=engine)
    assert engine.stats.waiting == engine.stats.running == engine.stats.pages == 0


def test_several_threads_share_one_batch() -> None:
    engine = Engine(small_model(), max_batch=8)
    results: dict[int, Generation] = {}

    def ask(number: int) -> None:
        results[number] = engine.submit(numbered_request(number)).result()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(12):
        assert_same(results[number], alone(number))
    alone_steps = sum(len(alone(number).delayed_codes) for number in range(12))
    assert engine.stats.steps < alone_steps / 2


def test_memory_is_back_at_its_level_after_two_hundred_cycles() -> None:
    """Finished, cancelled, failed and swapped requests, over and over."""
    engine = Engine(small_model(), max_batch=3, memory=600_000)

    def cycle(number: int) -> None:
        handles = [engine.submit(numbered_request(number + k), stream=k == 1) for k in range(4)]
        for _ in range(5):
            engine.step()
        handles[number % 4].cancel()
        with pytest.MonkeyPatch.context() as patch:  # one of its own: it keeps what it replaces, traceback included
            if number % 5 == 0:
                break_step(patch, ArithmeticError("planted"))
            for _ in range(4):
                engine.step()
        for handle in handles:
            handle.cancel()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for count in range(1, 4):
        for guided in (True, False):
            engine._stepper.view(count, guided)  # made once, and kept
    for number in range(20):
        cycle(number)
    before, peak = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(200):
        cycle(number)
    assert tensors() == before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 4096, f"{grown} KiB more than after the first twenty cycles"
    assert engine.stats.pages == engine.stats.text_pages == 0
    assert_sound(engine)
