"""Random operations from four threads and an event loop, some of them interrupted: all codes are as if alone."""

import asyncio
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from dia_fast import Dia, DiaFastError
from dia_fast.audio.codec import Codec, random_codec
from dia_fast.engine import Engine, EngineEvent, Generation, Handle, Request
from dia_fast.generation.inputs import ids_of
from dia_fast.generation.streaming import AsyncStream, Stream
from dia_fast.model.decode_state import Sizes
from tests.engine.test_interruptions import Line, Planted, is_with, traced
from tests.helpers.cheap_model import BAD, CheapModel, alone_cheaply
from tests.helpers.codecs import SMALL
from tests.helpers.schedules import CHANNELS, EOS, POSITIONS, assert_same, assert_sound, run_to_end

THREADS = 4
NUMBERS = 60
TEXTS = ("[S1] Yes.", "[S1] No. [S2] Oh, why?", "[S2] A rather long text that takes two pages of 32.")


def options_of(number: int) -> dict[str, Any]:
    """Return the keyword arguments of the `number`th of a fixed list of requests of every kind."""
    draw = random.Random(number)
    frames = draw.choice((0, 0, 1, 20, 31, 32, 60))
    speaker = number % 2 + 3  # two voices, so that requests share the pages of their prompts
    prompt = torch.arange(frames * CHANNELS).reshape(frames, CHANNELS) * speaker % EOS if frames else None
    return {
        "text": draw.choice(TEXTS),
        "audio_prompt": prompt,
        "max_new_tokens": draw.choice((5, 20, 33, 70, 70)),
        "guidance_scale": draw.choice((3.0, 3.0, None)),
        "seed": BAD if number == 7 else number,
    }


def request_of(number: int) -> Request:
    given = options_of(number)
    ids, prompt = ids_of(CheapModel().config, given.pop("text")), given.pop("audio_prompt")
    return Request(ids, prompt, **given)


def expected(number: int) -> Generation:
    return alone_cheaply(request_of(number))


@dataclass
class Callers:
    """Threads and a loop that do `total` operations on one `Dia`.

    Attributes:
        handles: Everything that was submitted, with its number.
        wrong: What should not have happened.
    """

    dia: Dia
    total: int
    done: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    handles: list[tuple[Handle, int]] = field(default_factory=list)
    wrong: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._count = itertools.count()

    def event(self, told: EngineEvent) -> None:
        self.events[f"{told.kind} {told.reason}" if told.reason else told.kind] += 1

    def more(self) -> bool:
        return next(self._count) < self.total and not self.wrong

    # Operations. Each may raise what ended a request.

    def submit(self, draw: random.Random) -> None:
        number = draw.randrange(NUMBERS)
        deadline = draw.choice((*[None] * 12, 0.002, 0.05))
        handle = self.dia.engine.submit(request_of(number), priority=draw.randint(-1, 1), deadline=deadline)
        self.handles.append((handle, number))

    def step(self, draw: random.Random) -> None:
        self.dia.engine.step()

    def advance(self, draw: random.Random) -> None:
        self.dia.engine.advance(draw.choice((0.0, 1e-3)))

    def look(self, draw: random.Random) -> None:
        handle, number = self._one(draw)
        there, known = handle.ready(), len(handle.delayed_codes())
        if handle.status != "failed":
            assert torch.equal(there, expected(number).frames[: len(there)])
        assert not handle.has(len(there) + known + 500)
        assert self.dia.engine.stats.running <= 4

    def wait(self, draw: random.Random) -> None:
        handle, number = self._one(draw)
        assert_same(handle.result(timeout=draw.choice((0.0, 0.002, 0.05))), expected(number))

    def read(self, draw: random.Random) -> None:
        handle, number = self._one(draw)
        pieces = list(itertools.islice(handle.frames(), draw.randint(1, 9)))
        if pieces:
            there = torch.cat(pieces)
            assert torch.equal(there, expected(number).frames[: len(there)])

    def want(self, draw: random.Random) -> None:
        self._one(draw)[0].want(draw.choice((None, 3, 20)))

    def cancel(self, draw: random.Random) -> None:
        self._one(draw)[0].cancel()

    def generate(self, draw: random.Random) -> None:
        number = draw.randrange(NUMBERS)
        [codes] = self.dia.generate_codes(**options_of(number), retries=0)
        assert torch.equal(codes, expected(number).frames)

    def stream(self, draw: random.Random) -> None:
        number, most = draw.randrange(NUMBERS), draw.choice((1, 3, None))
        stream = self.dia.stream(**options_of(number), retries=0, chunk_seconds=0.01)
        samples = sum(len(chunk.samples) for chunk in itertools.islice(stream, most))
        stream.close()
        if most is None:
            self._check(stream, samples, number)

    def drive(self, draw: random.Random) -> None:
        engine = self.dia.engine
        draw.choice((engine.start, engine.stop))()

    async def listen(self, draw: random.Random) -> None:
        number, most = draw.randrange(NUMBERS), draw.choice((1, 3, None, None))
        stream, samples, count = self.dia.astream(**options_of(number), retries=0, chunk_seconds=0.01), 0, 0
        try:
            async for chunk in stream:
                samples, count = samples + len(chunk.samples), count + 1
                if count == most:
                    return
        finally:
            await stream.aclose()
        self._check(stream, samples, number)

    def _one(self, draw: random.Random) -> tuple[Handle, int]:
        return draw.choice(self.handles[-40:])

    def _check(self, stream: Stream | AsyncStream, samples: int, number: int) -> None:
        script = stream._script if isinstance(stream, Stream) else stream._made[0]
        assert script.frames[0] is not None and torch.equal(script.frames[0], expected(number).frames)
        assert samples == self.dia.codec.config.samples_of(len(script.frames[0]))

    # Who does them

    def thread(self, seed: int) -> None:
        draw = random.Random(seed)
        self.attempt(self.submit, draw)
        work = {
            self.submit: 25, self.step: 20, self.advance: 15, self.look: 8, self.wait: 8, self.read: 5, self.want: 3,
            self.cancel: 4, self.generate: 3, self.stream: 3, self.drive: 1,
        }  # fmt: skip
        while self.more():
            [operation] = draw.choices(list(work), list(work.values()))
            self.attempt(operation, draw)

    def attempt(self, operation: Callable[[random.Random], None], draw: random.Random) -> None:
        planted = raising_at(draw.randint(1, 120)) if draw.random() < 0.08 else None
        self.done[operation.__name__] += 1
        try:
            with nullcontext() if planted is None else traced(planted):
                operation(draw)
        except (KeyboardInterrupt, Planted):
            self.done["interrupted"] += 1
        except (DiaFastError, TimeoutError):  # a request's own end
            self.done["raised"] += 1
        except BaseException as error:
            self.wrong.append(error)

    async def loop(self, seed: int) -> None:
        draw = random.Random(seed)

        async def listener() -> None:
            while self.more():
                self.done["listen"] += 1
                most = draw.choice((None, None, None, 0.01))
                try:
                    await asyncio.wait_for(self.listen(draw), most)
                except (DiaFastError, TimeoutError, asyncio.TimeoutError, Planted):  # a request's own end
                    self.done["raised"] += 1
                except Exception as error:
                    self.wrong.append(error)

        await asyncio.gather(*(listener() for _ in range(4)))

    def go(self) -> None:
        threads = [threading.Thread(target=self.thread, args=(seed,), daemon=True) for seed in range(THREADS)]
        threads.append(threading.Thread(target=lambda: asyncio.run(self.loop(THREADS)), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(500)
            assert not thread.is_alive(), f"somebody waits for ever: {self.done}"


def raising_at(count: int) -> Callable[[Line], None]:
    """Raise once, at the `count`th line of the engine that is come by."""
    left, error = count, Planted if count % 2 else KeyboardInterrupt

    def at(line: Line) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if is_with(line):
                left = 1
            else:
                raise error()

    return at


def small_codec() -> Codec:
    return random_codec(replace(SMALL, codebook_size=64))


@pytest.mark.parametrize("total", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")
@pytest.mark.filterwarnings("ignore:on_event raised:RuntimeWarning")
def test_random_operations_of_threads_and_a_loop(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = CheapModel()
    dia = Dia(model, small_codec())
    callers = Callers(dia, total)
    engine = dia._engine = Engine(
        model, sizes=Sizes(4, True, POSITIONS + 1, 64, 11, 6), max_waiting=20, on_event=callers.event
    )
    callers.go()
    if callers.wrong:
        raise callers.wrong[0]
    engine.stop()
    run_to_end(engine)
    ended: Counter[str] = Counter()
    for handle, number in callers.handles:
        ended[handle.status] += 1
        assert handle.done
        if handle.status == "done":
            assert_same(handle.result(), expected(number))
    with capsys.disabled():
        print(f"\n{dict(callers.done)}\nhandles: {dict(ended)}; events: {dict(callers.events)}")
    assert_sound(engine)
    assert engine.stats.pages == engine.stats.text_pages == 0 == len(engine._live)
    assert ended["done"] > len(callers.handles) / 3
    assert callers.done["interrupted"] > total / 200
    assert callers.events["swapped_out"] > total / 1000 and callers.events["ended deadline"] > total / 1000
    handles = [(engine.submit(request_of(number)), number) for number in range(6)]
    run_to_end(engine)
    for handle, number in handles:
        assert_same(handle.result(), expected(number))
