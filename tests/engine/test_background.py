"""An engine with a thread of its own: it goes on by itself, so far as anyone wants, and ends with its engine."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dia_fast import Dia, InputError
from dia_fast.engine import DeadlineExceeded, Engine, Request
from dia_fast.generation import streaming
from dia_fast.model.decode_state import Sizes
from tests.helpers.cheap_model import CheapModel, alone_cheaply
from tests.helpers.codecs import assert_same_sound
from tests.helpers.front import TEXT, make_dia
from tests.helpers.schedules import POSITIONS, assert_same

pytestmark = pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")


def made() -> Engine:
    model: Any = CheapModel(ends=False)
    return Engine(model, sizes=Sizes(2, True, POSITIONS + 1, 64, 40, 4))


def started() -> Engine:
    engine = made()
    engine.start()
    return engine


def request(number: int, most: int = 100) -> Request:
    return Request([1 + number], None, most, seed=number)


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(1e-3)


def settled(engine: Engine) -> int:
    """The number of steps, once there are no more of them."""
    while True:
        before = engine.steps
        time.sleep(0.05)
        if engine.steps == before:
            return before


def test_it_goes_on_as_far_as_is_wanted_and_rests() -> None:
    with made() as engine:
        handles = [engine.submit(request(number)) for number in range(2)]
        for handle in handles:
            handle.want(10)
        engine.start()  # not before: whoever says nothing wants everything
        until(lambda: all(handle.has(10) for handle in handles))
        steps = settled(engine)
        assert steps < 10 + 10 and not any(handle.done for handle in handles)
        handles[0].want(30)
        until(lambda: handles[0].has(30))
        assert settled(engine) < 30 + 10
        assert_same(handles[1].result(timeout=60), alone_cheaply(request(1), ends=False))
        assert_same(handles[0].result(timeout=60), alone_cheaply(request(0), ends=False))


def test_one_that_is_in_a_hurry_is_not_held_up_by_one_that_is_not() -> None:
    with started() as engine:
        slow, waiting = engine.submit(request(0)), engine.submit(request(1))
        slow.want(1)
        assert_same(waiting.result(timeout=60), alone_cheaply(request(1), ends=False))
        assert_same(slow.result(timeout=60), alone_cheaply(request(0), ends=False))


def test_who_looked_before_the_last_step_is_not_left_waiting() -> None:
    """The request ends between a look at it and the wait for the next step."""
    with started() as engine:
        handle = engine.submit(request(0, 5))
        until(lambda: handle.done)
        settled(engine)
        waiting = threading.Thread(target=engine.advance, daemon=True)
        waiting.start()
        waiting.join(20)
        assert not waiting.is_alive()


def test_a_deadline_holds_while_it_rests() -> None:
    with started() as engine:
        handle = engine.submit(request(0), deadline=0.3)
        handle.want(1)
        until(lambda: handle.done)
        assert isinstance(handle.error, DeadlineExceeded)


def test_its_thread_ends_with_the_engine_and_with_the_interpreter() -> None:
    engine = started()
    thread = engine._driver
    assert thread is not None
    engine.submit(request(0)).want(1)
    del engine
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    script = "from tests.engine.test_background import *; e = started(); e.submit(request(0)).want(3); time.sleep(0.1)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=100, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def dia(tmp_path_factory: pytest.TempPathFactory) -> Dia:
    return make_dia(tmp_path_factory.mktemp("background"))


def test_a_stream_goes_on_while_its_consumer_plays(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the bound; the sound is that of a stream that is made when it is asked for."""
    monkeypatch.setattr(streaming, "AHEAD_SECONDS", 0.25)  # 22 frames
    expected = np.concatenate([chunk.samples for chunk in dia.stream(TEXT, seed=8, max_new_tokens=200)])
    with Dia(dia.model, dia.codec, background=True) as ours:
        stream = ours.stream(TEXT, seed=8, max_new_tokens=200, chunk_seconds=0.1)
        made = [next(stream).samples]
        steps = settled(ours.engine)
        needed = 9 + 9 + dia.codec.decode_context_frames + 16  # the second chunk, and the delay pattern
        assert needed + 15 < steps < needed + 22 + 6
        made += [chunk.samples for chunk in stream]
        assert_same_sound(np.concatenate(made), expected, dia.codec)
        whole = ours.generate(TEXT, seed=8, max_new_tokens=200)
        assert_same_sound(whole.samples, expected, dia.codec)
        thread = ours.engine._driver
    assert thread is not None and not thread.is_alive()


def test_background_is_yes_or_no(dia: Dia) -> None:
    with pytest.raises(InputError, match="background must be True or False, not 'yes'"):
        Dia(dia.model, dia.codec, background="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("background", [False, True])
def test_asyncio_streams_need_nothing_of_the_loops_own_threads(dia: Dia, background: bool) -> None:
    """The caller's pool has one thread, and that one is busy until the streams have ended."""
    leave = threading.Event()

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, leave.wait, 60)

        async def listen(seed: int) -> int:
            return sum([len(chunk.samples) async for chunk in ours.astream(TEXT, seed=seed, max_new_tokens=40)])

        try:
            return await asyncio.wait_for(asyncio.gather(*map(listen, range(6))), 50)
        finally:
            leave.set()
            await busy

    with Dia(dia.model, dia.codec, background=background) as ours:
        assert asyncio.run(main()) == [
            len(audio.samples) for audio in dia.generate([TEXT] * 6, seed=list(range(6)), max_new_tokens=40)
        ]


def test_stop_waits_for_a_start_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, start = made(), threading.Thread.start

    def slowly(thread: threading.Thread) -> None:
        if thread.name == "dia-fast-engine":
            stopping.append(pool.submit(engine.stop))
            time.sleep(0.05)
        start(thread)

    stopping: list[Any] = []
    with ThreadPoolExecutor() as pool:
        pool.submit(int).result()  # its thread is there
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", slowly)
            engine.start()
        stopping[0].result(timeout=60)
        engine.stop()
        assert_same(engine.submit(request(0)).result(timeout=60), alone_cheaply(request(0), ends=False))


def interrupted_once(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> None:
    """Interrupt a call between the making of a thread and its beginning."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call()


def test_a_thread_that_never_began_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    interrupted_once(monkeypatch, engine.start)
    engine.stop()
    interrupted_once(monkeypatch, engine.start)
    engine.start()
    handle = engine.submit(request(0))
    until(lambda: handle.has(10))  # nobody but the thread makes steps
    engine.close()


def test_the_codecs_thread_that_never_began_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make_dia(tmp_path).codec
    codes = torch.zeros(30, codec.config.n_codebooks, dtype=torch.int64)
    interrupted_once(monkeypatch, lambda: codec.stream().decode_span(codes, 0, 30))
    with ThreadPoolExecutor() as pool:
        samples = pool.submit(lambda: codec.stream().decode_span(codes, 0, 30)).result(timeout=60)
    torch.testing.assert_close(samples, codec.decode(codes).cpu().flatten(), rtol=0, atol=1e-6)
