"""`Dia.astream`: what a server does with it."""

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dia_fast import Audio, CheckpointError, Dia, InputError, TextWarning
from dia_fast.audio.codec.incremental import IncrementalDecoder
from dia_fast.audio.codec.stage import CodecStream
from dia_fast.engine import Cancelled, Engine
from dia_fast.generation.long_form import Script
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.generation.streaming import Segments, _pumps
from dia_fast.model.model import DiaModel
from tests.helpers.codecs import assert_same_sound
from tests.helpers.front import TEXT, make_dia, make_model

pytestmark = pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")

LONG = 8  # a seed: 72 frames
FRAME = 512 / 44_100


@pytest.fixture(scope="module")
def dia(tmp_path_factory: pytest.TempPathFactory) -> Dia:
    return make_dia(tmp_path_factory.mktemp("astream"))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(main, 120)

    return asyncio.run(limited())


async def listen(chunks: AsyncGenerator[Audio, None]) -> np.ndarray:
    return np.concatenate([chunk.samples async for chunk in chunks])


def assert_nothing_left(dia: Dia) -> None:
    dia.engine.advance()  # waits for the end of the step that a thread may still be in
    stats = dia.engine.stats
    assert (stats.waiting, stats.running, stats.swapped, stats.pages, stats.text_pages) == (0, 0, 0, 0, 0)


def test_many_streams_share_one_batch_and_one_thread_of_steps(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    """More streams than asyncio's pool has threads on a small machine."""
    expected = [item.samples for item in dia.generate([TEXT] * 12, seed=list(range(12)), max_new_tokens=60)]
    before, at_once, busiest, waiting = dia.engine.steps, 0, 0, threading.Lock()
    real = Engine.advance

    def advance(self: Engine) -> None:
        nonlocal at_once, busiest
        with waiting:
            at_once += 1
            busiest = max(busiest, at_once)
        real(self)
        with waiting:
            at_once -= 1

    monkeypatch.setattr(Engine, "advance", advance)

    async def serve() -> list[np.ndarray]:
        return await asyncio.gather(
            *(listen(dia.astream(TEXT, seed=seed, max_new_tokens=60, chunk_seconds=0.15)) for seed in range(12))
        )

    for found, samples in zip(run(serve()), expected, strict=True):
        assert_same_sound(found, samples, dia.codec)
    assert busiest == 1
    assert dia.engine.steps - before < 2 * 61
    assert_nothing_left(dia)


def test_a_prompt_and_settings_count_as_they_do_in_generate(dia: Dia) -> None:
    sound = Audio(0.3 * np.sin(np.arange(9_000, dtype=np.float32) / 20), 44_100)
    chosen: dict[str, Any] = {"audio_prompt": sound, "seed": 3, "max_new_tokens": 40, "temperature": 1.5}
    found = run(listen(dia.astream(TEXT, **chosen)))
    assert_same_sound(found, dia.generate(TEXT, **chosen).samples, dia.codec)


class WatchedLock:
    """A lock that notes which threads take it."""

    def __init__(self, real: Any, threads: set[tuple[str, threading.Thread]], name: str) -> None:
        self.real, self.threads, self.name = real, threads, name

    def __enter__(self) -> None:
        self.threads.add((self.name, threading.current_thread()))
        self.real.acquire()

    def __exit__(self, *error: object) -> None:
        self.real.release()

    def locked(self) -> bool:
        return self.real.locked()


def test_the_loop_never_computes_and_never_waits_for_a_lock(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[str, threading.Thread]] = set()

    def watched(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **named: Any) -> Any:
            seen.add((name, threading.current_thread()))
            return real(*args, **named)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (DiaModel, "decode_step"),
        (CodecStream, "decode_span"),
        (IncrementalDecoder, "step"),
        (dia.codec, "encode"),
    ):
        watched(owner, name)
    for name in ("submit", "advance", "cancel"):
        watched(Engine, name)
    monkeypatch.setattr(dia.engine, "lock", WatchedLock(dia.engine.lock, seen, "engine"))
    monkeypatch.setattr(dia, "_making", WatchedLock(dia._making, seen, "making"))

    async def serve() -> None:
        sound = Audio(np.zeros(2_000, np.float32), 44_100)
        streams = [dia.astream(TEXT, seed=LONG, max_new_tokens=40, audio_prompt=prompt) for prompt in (None, sound)]
        await asyncio.gather(*map(listen, streams))
        async with aclosing(broken_off(dia)) as chunks:
            await anext(chunks)

    run(serve())
    names = {name for name, _ in seen}
    assert names == {"decode_step", "decode_span", "step", "encode", "submit", "advance", "cancel", "engine", "making"}
    assert not [name for name, thread in seen if thread is threading.main_thread()]


def broken_off(dia: Dia) -> AsyncGenerator[Audio, None]:
    return dia.astream(TEXT, seed=LONG, chunk_seconds=FRAME)


async def leave(dia: Dia) -> None:
    async for _ in broken_off(dia):
        break
    gc.collect()


async def close(dia: Dia) -> None:
    async with aclosing(broken_off(dia)) as chunks:
        await anext(chunks)


async def fail(dia: Dia) -> None:
    with pytest.raises(ZeroDivisionError):
        async with aclosing(broken_off(dia)) as chunks:
            async for _ in chunks:
                raise ZeroDivisionError


async def cancel(dia: Dia) -> None:
    task = asyncio.create_task(listen(broken_off(dia)))
    while not dia.engine.stats.running:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def time_out(dia: Dia) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(listen(broken_off(dia)), 0.1)


@pytest.mark.parametrize("end", [leave, close, fail, cancel, time_out])
def test_a_stream_that_is_left_early_leaves_nothing(dia: Dia, end: Any) -> None:
    before = dia.engine.steps
    run(end(dia))
    assert_nothing_left(dia)
    assert dia.engine.steps - before < 60


def test_one_that_is_cancelled_does_not_disturb_the_other(dia: Dia) -> None:
    expected = dia.generate(TEXT, seed=LONG).samples

    async def serve() -> np.ndarray:
        other = asyncio.create_task(listen(dia.astream(TEXT, seed=8, chunk_seconds=9)))
        stays = asyncio.create_task(listen(dia.astream(TEXT, seed=LONG, chunk_seconds=0.2)))
        while dia.engine.stats.running < 2:
            await asyncio.sleep(0.001)
        other.cancel()
        return await stays

    assert_same_sound(run(serve()), expected, dia.codec)
    assert_nothing_left(dia)


@pytest.mark.parametrize("order", [("fill", "withdraw"), ("withdraw", "fill")])
def test_a_request_is_withdrawn_before_it_is_there_or_after(dia: Dia, order: tuple[str, str]) -> None:
    segments = Segments(dia.engine, Script(dia.config, [TEXT], SamplingParams(seed=1)))
    for act in order:
        getattr(segments, act)()
    assert segments.current.status == "cancelled"
    assert_nothing_left(dia)


def test_a_codec_that_fails_in_one_stream_leaves_the_other_alone(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dia.generate(TEXT, seed=LONG).samples
    real = CodecStream.decode_span

    def broken(self: CodecStream, codes: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if stop - start == 1:
            raise RuntimeError("planted")
        return real(self, codes, start, stop)

    monkeypatch.setattr(CodecStream, "decode_span", broken)

    async def serve() -> list[Any]:
        streams = [dia.astream(TEXT, seed=LONG, chunk_seconds=seconds) for seconds in (6 * FRAME, FRAME)]
        return await asyncio.gather(*map(listen, streams), return_exceptions=True)

    good, bad = run(serve())
    assert_same_sound(good, expected, dia.codec)
    assert isinstance(bad, RuntimeError) and str(bad) == "planted"
    assert_nothing_left(dia)


def test_each_event_loop_may_have_its_own_streams(dia: Dia) -> None:
    expected = dia.generate(TEXT, seed=LONG, max_new_tokens=50).samples
    found: list[np.ndarray] = []

    def serve() -> None:
        found.append(run(listen(dia.astream(TEXT, seed=LONG, max_new_tokens=50, chunk_seconds=0.1))))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for item in found:
        assert_same_sound(item, expected, dia.codec)
    gc.collect()
    assert not len(_pumps._pumps[dia.engine]), "loops that are closed are not kept"


def test_what_cannot_be_spoken_is_refused(dia: Dia, tmp_path: Path) -> None:
    for arguments, message in (
        ({"text": ""}, "text is empty"),
        ({"text": [TEXT]}, "a stream speaks one text"),
        ({"chunk_seconds": -1}, "chunk_seconds must be"),
        ({"top_p": 2}, "top_p must be"),
        ({"audio_prompt": []}, "audio_prompt is a list"),
    ):
        with pytest.raises(InputError, match=message):
            dia.astream(**{"text": TEXT, **arguments})
    with pytest.raises(InputError, match="no such recording"):
        run(listen(dia.astream(TEXT, audio_prompt="no such file")))
    lost = Dia.from_pretrained(make_model(tmp_path / "model"), codec=tmp_path / "codec", device="cpu")
    with pytest.raises(CheckpointError, match="codec"):
        run(listen(lost.astream(TEXT)))
    assert_nothing_left(dia)


def test_closing_the_dia_ends_its_streams(tmp_path: Path) -> None:
    dia = make_dia(tmp_path)

    async def serve() -> None:
        chunks = dia.astream(TEXT, seed=LONG, chunk_seconds=FRAME)
        await anext(chunks)
        await asyncio.to_thread(dia.close)
        await anext(chunks)

    with pytest.raises(Cancelled):
        run(serve())


def test_warnings_blame_the_caller(dia: Dia) -> None:
    async def serve() -> None:
        async for _ in dia.astream("No tag.", seed=0, max_new_tokens=17):
            pass

    with pytest.warns(TextWarning) as record:
        asyncio.run(serve())
    sentences = [str(item.message) for item in record]
    assert any("begin with [S1]" in sentence for sentence in sentences)
    assert "speech was cut after 17 steps, by max_new_tokens" in sentences
    assert {item.filename for item in record} == {__file__}
