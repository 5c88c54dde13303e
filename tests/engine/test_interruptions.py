"""An interruption or an error at every line of what runs requests: no request is lost, no page, no code."""

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from dia_fast.engine import (
    Engine,
    EngineEvent,
    EngineFull,
    Handle,
    Request,
    batch_rows,
    decode_graphs,
    handle,
    polling,
    scheduler,
    sequence,
)
from dia_fast.model import decode_state, kv_cache
from dia_fast.model.decode_state import Sizes
from tests.helpers.cheap_model import BAD, CheapModel, alone_cheaply
from tests.helpers.schedules import CHANNELS, EOS, POSITIONS, assert_same, assert_sound, run_to_end
from tests.helpers.virtual_device import VirtualDevice

MODULES = (scheduler, sequence, batch_rows, polling, handle, decode_graphs, decode_state, kv_cache)
FILES = {module.__file__ for module in MODULES}
Line = tuple[CodeType, int]


class Planted(RuntimeError):
    """The error that is raised at a line."""


def listen(event: EngineEvent) -> None:
    """A listener with an error of its own now and then."""
    if event.number == 4:
        raise ArithmeticError("planted in a listener")


def request(
    number: int,
    frames: int = 0,
    most: int = 8,
    guidance: float | None = 3.0,
    text: int = 5,
    voice: int | None = None,
    guided: int | None = None,
) -> Request:
    speaker = (number if voice is None else voice) + 3
    codes = torch.arange(frames * CHANNELS).reshape(frames, CHANNELS) * speaker % EOS if frames else None
    ids = [1 + number % 200] * text
    return Request(ids, codes, most, guidance_scale=guidance, seed=number, guidance_steps=guided)


@dataclass
class Run:
    """A schedule that comes by every line: newcomers, prompts, swapping, cancelling, deadlines, errors of the model.

    broken: a function of `batch_rows` that raises the first time.
    """

    device: VirtualDevice | None
    broken: str | None = None
    engine: Engine = field(init=False)
    handles: list[tuple[Handle, Request]] = field(default_factory=list)
    raised: int = 0

    def __post_init__(self) -> None:
        sizes = Sizes(3, True, POSITIONS + 1, 64, 9, 6)
        model: Any = CheapModel(ends=False)
        self.engine = Engine(model, sizes=sizes, prefill_tokens=1, max_waiting=6, on_event=listen, device=self.device)

    def actions(self) -> Iterator[Callable[[], Any]]:
        """Requests 0 to 2 want more pages than there are, from their third or fourth page on."""
        step = self.engine.step
        yield lambda: self.submit(request(30, 124, 12))
        yield from [step] * 7
        yield lambda: self.submit(request(0, 20, 22))
        yield lambda: self.submit(request(1, 21, 40, None, text=40))
        yield lambda: self.submit(request(2, 27, 20))
        yield lambda: self.submit(request(3, 66, 5))
        yield lambda: self.submit(request(4, 0, 5, None))
        yield from [step] * 16
        yield lambda: self.handles[2][0].cancel()
        yield from [step] * 6
        yield lambda: self.submit(request(BAD, 2, 6))
        yield lambda: self.submit(request(5, 2, 6), priority=-1, deadline=1e-3)
        yield from [step] * 3
        yield lambda: self.submit(request(6, 40, 6, None), deadline=100.0)
        yield lambda: self.handles[-1][0].cancel()
        yield from [step] * 2
        yield lambda: self.breaking("store_text", request(7))
        yield lambda: self.breaking("decode_step", request(8))
        yield lambda: list(self.handles[0][0].frames())
        yield lambda: self.handles[8][0].result()
        yield self.full
        yield lambda: self.engine.stats
        yield lambda: self.submit(request(9, 29, 30))
        yield lambda: self.submit(request(10, 29, 30))
        yield lambda: self.submit(request(11, 29, 120))
        yield from [step] * 11
        yield lambda: self.breaking("decode_step", request(12), KeyboardInterrupt())
        yield lambda: self.submit(request(13, 0, 139))
        yield lambda: self.engine.advance(0.0)
        yield from [step] * 2
        yield lambda: [handle.cancel() for handle, _ in self.handles]
        # One prompt for all: its full pages are shared, also with one that comes back, and those of an ended one.
        yield lambda: self.submit(request(14, 60, 7, voice=2))
        yield lambda: self.submit(request(15, 60, 9, voice=2))
        yield from [step] * 17
        yield lambda: self.submit(request(16, 60, 4, voice=2, guided=2))
        yield lambda: self.handles[-1][0].result()
        yield self.engine.close

    def submit(self, asked: Request, **named: Any) -> None:
        self.handles.append((self.engine.submit(asked, **named), asked))

    def full(self) -> None:
        for _ in range(8):
            try:
                self.engine.submit(request(11)).cancel()
            except EngineFull:
                return

    def breaking(self, what: str, asked: Request, error: BaseException | None = None) -> None:
        """The model breaks once."""
        model: Any = self.engine.model
        self.submit(asked)

        def broken(*args: Any, **named: Any) -> None:
            del model.__dict__[what]
            raise error or ArithmeticError("planted in the model")

        model.__dict__[what] = broken
        try:
            for _ in range(9):
                self.engine.step()
                if what not in model.__dict__:
                    break
        finally:
            model.__dict__.pop(what, None)

    def go(self) -> None:
        real = getattr(batch_rows, self.broken or "", None)

        def breaks(*args: Any, **named: Any) -> None:
            setattr(batch_rows, self.broken or "", real)
            raise ArithmeticError("planted in the engine")

        if self.broken:
            setattr(batch_rows, self.broken, breaks)
        try:
            self._act()
        finally:
            if self.broken:
                setattr(batch_rows, self.broken, real)

    def _act(self) -> None:
        for action in self.actions():
            try:
                action()
            except (Planted, KeyboardInterrupt, IndexError):  # of a request that was never submitted, the last
                self.raised += 1
            except Exception as error:  # what a request was ended by
                assert isinstance(error, scheduler.DiaFastError | ArithmeticError), error

    def check(self) -> None:
        """The engine is as good as new."""
        engine = self.engine
        assert not engine.lock.locked() and not engine._door.locked()
        run_to_end(engine, 400)
        for got, asked in self.handles:
            assert got.done
            if got.status == "done":
                assert_same(got.result(), alone_cheaply(asked, ends=False))
            else:
                assert got.error is not None or got.status == "cancelled"
        assert_sound(engine)
        assert engine.stats.pages == engine.stats.text_pages == 0 == len(engine._live)
        after = [request(20, 30, 9), request(21, 3, 9, None)]
        handles = [engine.submit(item) for item in after]
        run_to_end(engine, 100)
        for got, item in zip(handles, after, strict=True):
            assert_same(got.result(), alone_cheaply(item, ends=False))


@contextmanager
def traced(on_line: Callable[[Line], None], only: CodeType | None = None) -> Iterator[None]:
    """Have a function called before each line of the modules, or of one function of theirs."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            on_line((frame.f_code, frame.f_lineno))
        return local

    def everywhere(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        return local if (code is only if only else code.co_filename in FILES) else None

    before = sys.gettrace()
    sys.settrace(everywhere)
    try:
        yield
    finally:
        sys.settrace(before)


def hits(make: Callable[[], Run]) -> Counter[Line]:
    """Count how often each line is come by."""
    found: Counter[Line] = Counter()
    run = make()
    with traced(lambda line: found.update([line])):
        run.go()
    run.check()
    return found


def interrupt(run: Run, line: Line, hit: int, error: type[BaseException]) -> bool:
    """Raise once, when a line is come by for the `hit`th time; whatever happens, the engine is sound afterwards.

    Returns whether the line was come by: the interpreter leaves out a line now and then.
    """
    left = hit

    def at(where: Line) -> None:
        nonlocal left
        if where == line:
            left -= 1
            if left == 0:
                raise error()

    with traced(at, line[0]):
        run.go()
    run.check()
    return left <= 0


def is_with(line: Line) -> bool:
    return linecache.getline(line[0].co_filename, line[1]).lstrip().startswith("with ")


def all_lines() -> set[tuple[str, int]]:
    """The lines in functions of the modules, of those that set an object up less."""
    found: set[tuple[str, int]] = set()

    def add(code: CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                name = constant.co_name
                if name in ("__init__", "self_pages", "cross_pages", "_renew"):
                    continue
                # The body of a class is none, and the first line of a function is that of its name.
                if not name[0].isupper():
                    found.update((constant.co_filename, line) for _, _, line in constant.co_lines() if line)
                    found.discard((constant.co_filename, constant.co_firstlineno))
                add(constant)

    for file in FILES:
        assert file is not None
        with open(file, encoding="utf-8") as source:
            add(compile(source.read(), file, "exec"))
    return found


BREAKING = (None, "place", "swap_in", "swap_out")


def runs() -> Iterator[Callable[[], Run]]:
    for on in (lambda: VirtualDevice(1e-3), lambda: None):
        for name in BREAKING:
            yield lambda on=on, name=name: Run(on(), name)  # type: ignore[misc]


def raise_everywhere(full: bool) -> tuple[int, int]:
    """Raise at every line; return how often, and at how many lines.

    full: both at the first, the middle and the last time that a line is come by; else one of them once. A tracer is
    also called when a `with` block ends, before what ends it: nothing else could raise there, so neither do we.
    """
    seen: set[Line] = set()
    count = 0
    for make in runs():
        found = hits(make)
        for number, line in enumerate(line for line in found if line not in seen):
            times = [1] if is_with(line) else sorted({1, (found[line] + 1) // 2, found[line]})
            cases = [(hit, error) for hit in times for error in (KeyboardInterrupt, Planted)]
            for hit, error in cases if full else [cases[number % len(cases)]]:
                done = interrupt(make(), line, hit, error) or interrupt(make(), line, hit, error)
                count += done
        seen |= set(found)
    return count, len({(code.co_filename, line) for code, line in seen})


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:on_event raised:RuntimeWarning")
def test_an_interruption_or_an_error_at_every_line(full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    count, lines = raise_everywhere(full)
    every = all_lines()
    with capsys.disabled():
        print(f"raised {count} times, at {lines} of {len(every)} lines")
    assert lines > 0.85 * len(every)  # the others refuse arguments, or belong to the thread of `start`
    assert count > 0.99 * lines * (2 if full else 1)
