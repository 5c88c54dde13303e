"""Demands of streams on the engine that a `Dia` keeps: threads that wait, requests that are dropped at any moment."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_fast import Dia, InputError
from dia_fast.engine import Engine, Handle
from dia_fast.generation.inputs import engine_limits
from dia_fast.model.decode_state import DecodeState
from dia_fast.model.model import DiaModel
from tests.helpers.front import TEXT, make_dia
from tests.helpers.schedules import alone, assert_same, assert_sound, numbered_request, run_to_end, small_model

LONG = [1, 6, 11]  # of the numbered requests: those that run for twenty steps and more


def during_a_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Call `act` once, in the middle of the next step."""
    real = DiaModel.decode_step

    def step(self: DiaModel, state: DecodeState) -> None:
        monkeypatch.setattr(DiaModel, "decode_step", real)
        act()
        real(self, state)

    monkeypatch.setattr(DiaModel, "decode_step", step)


def test_whoever_waits_looks_after_the_step_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads wait: one makes the step, the other returns when that step ends, and makes none."""
    engine = Engine(small_model(), max_batch=2)
    handle = engine.submit(numbered_request(LONG[0]), stream=True)
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def hold() -> None:
        inside.set()
        assert go_on.wait(60)

    during_a_step(monkeypatch, hold)
    leader = threading.Thread(target=engine.advance)
    follower = threading.Thread(target=lambda: (engine.advance(), seen.append(engine.steps)))
    leader.start()
    assert inside.wait(60)
    follower.start()
    # None of these may wait for the step that is being made.
    assert len(handle.ready()) == 0 and not handle.has(1) and not handle.done and engine.steps == 0
    follower.join(0.05)
    assert follower.is_alive() and not seen
    go_on.set()
    leader.join(60)
    follower.join(60)
    assert seen == [1] and engine.steps == 1
    assert_same(handle.result(), alone(LONG[0]))


def test_a_step_that_raises_lets_the_next_thread_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small_model(), max_batch=2)
    engine.submit(numbered_request(LONG[0]))

    def interrupted() -> None:
        raise KeyboardInterrupt

    during_a_step(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.advance()
    after = threading.Thread(target=lambda: engine.submit(numbered_request(LONG[1])).result(), daemon=True)
    after.start()
    after.join(60)
    assert not after.is_alive()


def test_a_handle_that_the_garbage_collector_cancels_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalizer runs anywhere, also in the thread that makes a step and holds the lock."""
    engine = Engine(small_model(), max_batch=4)
    dropped, kept = [engine.submit(numbered_request(number)) for number in LONG[:2]]  # at batch indices 0 and 1
    for _ in range(5):
        engine.step()

    class Listener:
        def __init__(self, handle: Handle) -> None:
            self.handle, self.myself = handle, self

        def __del__(self) -> None:
            self.handle.cancel()

    listener = Listener(dropped)
    del listener
    during_a_step(monkeypatch, gc.collect)
    engine.step()
    assert (dropped.status, kept.status) == ("cancelled", "running")
    assert engine.stats.running == 1
    assert_sound(engine)
    run_to_end(engine)
    assert_same(kept.result(), alone(LONG[1]))
    assert engine.stats.pages == 0


def test_calls_in_threads_share_the_engine_and_change_nothing(tmp_path: Path) -> None:
    dia = make_dia(tmp_path, max_batch=4)
    seeds = range(6)
    expected = [dia.generate_codes(TEXT, seed=seed)[0] for seed in seeds]
    engine, before = dia.engine, dia.engine.steps
    found: dict[int, torch.Tensor] = {}
    progress: list[int] = []

    def speak(seed: int) -> None:
        found[seed] = dia.generate_codes(TEXT, seed=seed, progress=progress.append)[0]

    threads = [threading.Thread(target=speak, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in seeds)
    assert dia.engine is engine and engine.state.batch == 4
    assert engine.steps - before < sum(len(codes) + 17 for codes in expected)
    assert 0 < max(progress) <= engine.steps - before
    assert engine.stats.pages == engine.stats.running == 0


def test_one_engine_is_made_even_if_many_ask_at_once(tmp_path: Path) -> None:
    dia = make_dia(tmp_path)
    made: list[Engine] = []
    all_there = threading.Barrier(8)
    threads = [threading.Thread(target=lambda: (all_there.wait(), made.append(dia.engine))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(set(made)) == 1


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        (None, None),
        (5, 5),
        ("5", 5),
        ("4GB", 4 * 10**9),
        (" 1.5 gb ", 15 * 10**8),
        ("512MiB", 2**29),
        ("2T", 2 * 10**12),
        ("3k", 3000),
    ],
)
def test_memory_in_bytes_or_words(memory: Any, size: int | None) -> None:
    assert engine_limits(32, memory) == {"max_batch": 32, "memory": size}


@pytest.mark.parametrize(
    "memory", [0, -1, 1.5, True, "", "GB", "-4GB", "4 apples", "4iB", "0GB", "nan", [4], "9" * 400]
)
def test_memory_that_is_none(memory: Any) -> None:
    with pytest.raises(InputError, match='memory must be a number of bytes, or a text such as "4GB"'):
        engine_limits(1, memory)


@pytest.mark.parametrize("max_batch", [0, 33, True, 1.5, "4", None])
def test_batches_that_are_none(tmp_path: Path, max_batch: Any) -> None:
    with pytest.raises(InputError, match="max_batch must be (from 1 to 32|a whole number), not "):
        Dia.from_pretrained(tmp_path / "not read", codec=None, max_batch=max_batch)


def test_memory_bounds_the_pages_and_too_little_is_refused(tmp_path: Path) -> None:
    dia = make_dia(tmp_path, memory="1MB")
    assert 900_000 < dia.engine.stats.total_bytes <= 1_000_000
    assert len(dia.generate_codes([TEXT] * 3, seed=1)) == 3
    small = Dia(dia.model, None, memory=1000)
    with pytest.raises(InputError, match="memory: 1000 bytes hold no request; give at least "):
        small.generate_codes(TEXT, seed=1)
