"""The parts of the server that need no process."""

import asyncio
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra server is not installed")

from dia_fast import Dia, InputError
from dia_fast.server.conversation import Sentences
from dia_fast.server.driver import Driver
from dia_fast.server.encoders import FORMATS, Pipeline, _Sink
from dia_fast.server.options import Options, read_keys
from dia_fast.server.queueing import Gate
from dia_fast.server.schemas import SpeechRequest
from dia_fast.server.service import Service
from tests.server.serving import LONG


@hypothesis.given(
    st.lists(
        st.sampled_from(["[S1] ", "[S2] ", "Hello. ", "Dr. No ", "(clears throat. Well) ", "why? ", "x", "。", "\n"])
    ),
    st.data(),
)
def test_sentences_do_not_depend_on_how_the_text_comes(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    whole, pieces = Sentences(), Sentences()
    expected = whole.take(text) + whole.take("", last=True)
    found = [
        one for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) for one in pieces.take(text[start:end])
    ]
    found += pieces.take("", last=True)
    words = [" ".join(" ".join(items).replace("[S1]", "").replace("[S2]", "").split()) for items in (expected, found)]
    assert words[0].replace(" ", "") == words[1].replace(" ", "")
    assert all(one.count("[S1]") + one.count("[S2]") <= 1 for one in found)


def test_sentences_of_a_dialogue() -> None:
    one = Sentences()
    assert one.take("[S1] Dr. No is here. He (clears throat. Well) sits. [S2] Why? Be") == [
        "[S1] Dr. No is here.",
        "[S1] He (clears throat. Well) sits.",
        "[S2] Why?",
    ]
    assert one.take("cause.", last=True) == ["[S2] Because."]


@hypothesis.given(st.lists(st.tuples(st.integers(0, 30), st.binary(max_size=12)), max_size=20))
def test_a_sink_gives_what_was_appended_once(writes: list[tuple[int, bytes]]) -> None:
    sink, kept = _Sink(), b""
    model = bytearray()
    for back, data in writes:
        position = max(0, len(model) - back)
        sink.seek(position)
        sink.write(data)
        model += data[len(model) - position :]
        kept += sink.take()
    assert kept == bytes(model) and sink.seek(0, 2) == len(model)


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "aac"])
def test_cuts_do_not_change_what_is_written(form: str) -> None:
    samples = (0.3 * np.sin(np.arange(20_000) * 0.05)).astype(np.float32)
    shape = FORMATS[form]

    def written(cuts: list[int]) -> bytes:
        pipeline = Pipeline(shape, 16_000, shape.rate(16_000))
        return b"".join(pipeline.write(part) for part in np.split(samples, cuts)) + pipeline.close()

    one, several = written([]), written([1, 4_000, 4_001, 15_000])
    if form == "opus":  # a serial number is drawn, and pages follow the writes
        assert abs(len(one) - len(several)) < 500
    else:
        assert one == several


def test_opus_pages_come_often() -> None:
    """libsndfile keeps a second back unless told otherwise, by a command that soundfile has no name for."""
    pipeline = Pipeline(FORMATS["opus"], 16_000, 48_000)
    sound = np.random.default_rng(0).standard_normal(16_000 * 2).astype(np.float32) * 0.1
    sizes = [len(pipeline.write(part)) for part in np.split(sound, 20)]
    assert sum(size > 0 for size in sizes[3:]) >= 15


def test_a_slow_reader_holds_no_slot_and_little_sound() -> None:
    """Nobody reads: some sound is made ahead, then the speech waits, and another one is spoken meanwhile."""

    async def speak() -> None:
        service = Service(Options(max_batch=1, slow_seconds=1.0), lambda: Dia.from_pretrained("demo", max_batch=1))
        await service.load()
        assert service.state == "ready", service.failure
        try:
            slow = service.start(await service.prepared(SpeechRequest(input=LONG, seed=5), LONG))
            while slow._held <= 1.0:
                await asyncio.sleep(0.01)
            while not service.gate.free:
                await asyncio.sleep(0.01)
            made = slow.seconds
            other = service.start(await service.prepared(SpeechRequest(input="[S1] Red.", seed=3), "[S1] Red."))
            assert b"".join([data async for data in other])
            assert slow.seconds == made < 1.5 and not slow.task.done()
            async for _ in slow:
                pass
            assert slow.seconds > 2 and service.gate.free == 1
        finally:
            await service.close()

    asyncio.run(asyncio.wait_for(speak(), 60))


def test_those_who_go_on_come_before_those_who_begin() -> None:
    async def queue() -> list[str]:
        gate, order = Gate(1, 9), list[str]()

        async def take(name: str, goes_on: bool) -> None:
            release = await gate.acquire(goes_on=goes_on)
            order.append(name)
            await asyncio.sleep(0)
            release()
            release()

        first = await gate.acquire(goes_on=False)
        tasks = [asyncio.create_task(take(name, name == "on")) for name in ("a", "b", "on", "left")]
        await asyncio.sleep(0)
        tasks[3].cancel()
        first()
        tasks[0].cancel()  # the turn was just given to "on"; "a" leaves the line
        await asyncio.gather(*tasks, return_exceptions=True)
        assert gate.free == 1
        return order

    assert asyncio.run(queue()) == ["on", "b"]


def test_a_slot_given_to_one_who_leaves_goes_on_to_the_next() -> None:
    async def queue() -> None:
        gate = Gate(1, 9)
        first = await gate.acquire(goes_on=False)
        leaving, next_one = (asyncio.create_task(gate.acquire(goes_on=False)) for _ in range(2))
        await asyncio.sleep(0)
        first()
        leaving.cancel()
        (await asyncio.wait_for(next_one, 1))()
        assert gate.free == 1

    asyncio.run(queue())


class Running:
    """A handle whose speech goes on until it is cancelled."""

    done = False

    def cancel(self) -> None:
        self.done = True

    def has(self, frames: int) -> bool:
        return False


class Taking:
    """As much of an engine as a driver uses: it takes every request, or none."""

    steps = 0

    def __init__(self, *, full: bool) -> None:
        self.full, self.taken = full, list[Running]()

    def submit(self, request: object, stream: bool) -> Running:
        if self.full:
            raise InputError("no")
        self.taken.append(Running())
        return self.taken[-1]

    def step(self) -> bool:
        return False

    def close(self) -> None:
        pass


@pytest.mark.parametrize("full", [False, True], ids=["taken", "refused"])
@pytest.mark.parametrize("moment", ["before", "with", "after"])
def test_whoever_leaves_while_a_request_is_submitted_leaves_nothing(full: bool, moment: str) -> None:
    """Before the engine's answer, with it (the caller has not gone on yet), or after it."""

    async def leave() -> None:
        engine, ended = Taking(full=full), asyncio.Event()
        driver = Driver(engine, asyncio.get_running_loop(), lambda seconds: None)  # type: ignore[arg-type]
        answer = driver._call

        def call(function: Callable[..., None], *args: object) -> None:
            def deliver() -> None:
                if moment == "before":
                    task.cancel()
                function(*args)
                if moment == "with":
                    task.cancel()

            answer(deliver)

        driver._call = call  # type: ignore[method-assign]

        async def ask() -> None:
            try:
                handle = await driver.submit(None, ended.set)  # type: ignore[arg-type]
            except InputError:
                ended.set()
                return
            try:
                await driver.wait(handle, 1)
            finally:
                driver.cancel(handle)

        task = asyncio.create_task(ask())
        try:
            if moment == "after":
                while not engine.taken and not full:
                    await asyncio.sleep(0)
                await asyncio.sleep(0.01)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.wait_for(ended.wait(), 10)
            assert all(handle.done for handle in engine.taken) and bool(engine.taken) is not full
        finally:
            driver.stop()

    asyncio.run(leave())


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": "example.com"},
        {"port": 70_000},
        {"max_queue": -1},
        {"keys": ("",)},
        {"uploads": True},
        {"max_body": 1},
        {"request_timeout": float("nan")},
    ],
)
def test_options_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(InputError):
        Options(**wrong)


def test_options_that_can_be() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert Options(host=host).loopback
    assert not Options(host="0.0.0.0", keys=("k",)).loopback
    assert not Options(host="0.0.0.0", no_auth=True).loopback
    assert "k3y" not in repr(Options(keys=("k3y",)))


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n one \ntwo\n")
    assert read_keys(path) == ("one", "two")
    path.write_text("# none\n")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(path)


def test_encoders_work_side_by_side() -> None:
    samples = np.random.default_rng(0).standard_normal(40_000).astype(np.float32) * 0.1

    def one(_: int) -> bytes:
        pipeline = Pipeline(FORMATS["mp3"], 16_000, 16_000)
        return b"".join(pipeline.write(part) for part in np.split(samples, 8)) + pipeline.close()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(one, range(8)))) == 1


def test_replicas_tell_the_same_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets a copy of the options, and is made at its own time."""
    options = Options()
    monkeypatch.setattr(time, "time", lambda: options.started + 100.0)
    for copy in (options, pickle.loads(pickle.dumps(options))):
        service = Service(copy, lambda: Dia.from_pretrained("demo"))
        assert service.options.started == options.started > 0
        assert {voice.created for voice in service.voices.all()} == {options.started}
