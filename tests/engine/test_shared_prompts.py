"""Requests with one prompt compute its unconditional half once, with the codes that each has alone."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from dia_fast.engine import Engine, Generation, Handle, Request, batch_rows
from dia_fast.errors import OutOfPages
from dia_fast.model.decode_state import DecodeState, Sizes
from dia_fast.model.kv_cache import PAGE_SIZE
from tests.engine.test_schedule import poison
from tests.helpers.cheap_model import BAD, CheapModel, alone_cheaply
from tests.helpers.schedules import CHANNELS, EOS, POSITIONS, assert_same, assert_sound, run_to_end, small_model


def voice(frames: int, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, EOS, (frames, CHANNELS), generator=generator)


def spoken(number: int, prompt: Tensor | None, most: int = 20, **given: Any) -> Request:
    """A request whose text and seed are its own."""
    return Request([1 + number, 2, 3], prompt, most, **{"seed": number, "temperature": 1.2} | given)


def by_itself(model: Any, request: Request) -> Generation:
    return Engine(model, max_batch=1).submit(request).result()


def counting(model: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the rows of prefill of each half from now on."""
    rows: Counter[str] = Counter()
    real = model.prefill

    def counted(codes: Tensor, state: DecodeState, table_idx: int, text_length: int | None, *, first: int = 0) -> None:
        rows["unconditional" if text_length is None else "conditional"] += len(codes)
        real(codes, state, table_idx, text_length, first=first)

    monkeypatch.setattr(model, "prefill", counted)
    return rows


@pytest.mark.parametrize("frames", [1, 31, 32, 33, 64, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_call_computes_half_of_the_prompt_and_says_the_same(
    frames: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_rows, "CHUNK", 40)
    model, prompt = small_model(dtype), voice(frames)
    requests = [spoken(number, prompt, guidance_scale=scale) for number, scale in enumerate((3.0, 3.0, 2.0))]
    expected = [by_itself(model, request) for request in requests]
    engine, rows = Engine(model, max_batch=4), counting(model, monkeypatch)
    for number, request in enumerate(requests):
        assert_same(engine.submit(request).result(), expected[number])
        assert rows == {"conditional": (number + 1) * frames, "unconditional": frames}
    run_to_end(engine)
    assert_sound(engine)
    assert engine.stats.pages == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_those_that_run_together_share_full_pages_and_copy_the_last(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 steps of a prompt: two full pages for all, one that each goes on in."""
    model, prompt = small_model(dtype, 0.0), voice(70)
    requests = [spoken(number, prompt, 9 + number) for number in range(4)]
    expected = [by_itself(model, request) for request in requests]
    engine, rows = Engine(model, max_batch=4), counting(model, monkeypatch)
    handles = [engine.submit(request) for request in requests]
    while engine.stats.running < 4:
        engine.step()
        poison(engine)
        assert_sound(engine)
    assert engine.stats.pages == 4 * (3 + 1) + 2
    assert rows == {"conditional": 4 * 70, "unconditional": 70}
    while engine.step():
        poison(engine)
        assert_sound(engine)
    for handle, codes in zip(handles, expected, strict=True):
        assert_same(handle.result(), codes)
    assert engine.stats.pages == 0


def test_what_a_page_held_is_forgotten_when_somebody_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = small_model(eos=0.0), voice(40)
    engine = Engine(model, sizes=Sizes(2, True, POSITIONS + 1, 64, 6, 4))
    rows = counting(model, monkeypatch)
    asked = [spoken(0, prompt, 5), spoken(1, None, 70), spoken(2, prompt, 5), spoken(3, prompt, 5)]
    expected = [by_itself(small_model(eos=0.0), request) for request in asked]
    rows.clear()
    for request, codes, computed in zip(asked, expected, (40, 40, 80, 80), strict=True):
        assert_same(engine.submit(request).result(), codes)
        assert rows["unconditional"] == computed
        poison(engine)
    assert engine.stats.pages == 0


@pytest.mark.parametrize("guided", [1, 2, 33])
def test_one_whose_guidance_ends_leaves_the_shared_pages_as_they_are(guided: int) -> None:
    """Its unconditional rows go on writing to a page, which must be its own."""
    for frames in (20, 32, 64, 70):
        model: Any = CheapModel(ends=False)
        prompt = voice(frames)
        first, second = spoken(0, prompt, 50, guidance_steps=guided), spoken(1, prompt, 60)
        engine = Engine(model, max_batch=3)
        handles = [engine.submit(request) for request in (second, first, second)]
        run_to_end(engine)
        handles.append(engine.submit(second))
        run_to_end(engine)
        for handle, request in zip(handles, (second, first, second, second), strict=True):
            assert_same(handle.result(), alone_cheaply(request, ends=False))
        assert engine.stats.pages == 0


def test_other_weights_compute_the_prompt_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = CheapModel(), voice(40)
    engine, rows = Engine(model, max_batch=1), counting(model, monkeypatch)  # type: ignore[arg-type]
    for _ in range(2):
        engine.submit(spoken(0, prompt)).result()
    assert rows["unconditional"] == 40
    model.revision += 1
    engine.submit(spoken(0, prompt)).result()
    assert rows["unconditional"] == 80
    real = small_model()
    before = real.revision
    real.finalize()
    assert real.revision > before


def test_without_guidance_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = CheapModel(), voice(40)
    engine, rows = Engine(model, max_batch=2), counting(model, monkeypatch)  # type: ignore[arg-type]
    for scale in (None, 3.0, None, 3.0):
        asked = spoken(1, prompt, guidance_scale=scale)
        assert_same(engine.submit(asked).result(), alone_cheaply(asked))
    assert rows == {"conditional": 160, "unconditional": 40}


def test_kept_pages_that_nobody_holds_are_counted_as_needed() -> None:
    """One that finds its prompt, but no room for the rest, waits."""
    engine = Engine(CheapModel(ends=False), sizes=Sizes(2, True, POSITIONS + 1, 64, 8, 6))  # type: ignore[arg-type]
    for asked in (spoken(0, voice(64), 5), spoken(1, None, 30)):
        handle = engine.submit(asked)
        run_to_end(engine)
        assert handle.status == "done"
    asked = [spoken(2, None, 40), spoken(3, voice(64), 20)]
    handles = [engine.submit(request) for request in asked]
    run_to_end(engine)
    for handle, request in zip(handles, asked, strict=True):
        assert_same(handle.result(), alone_cheaply(request, ends=False))


class Speakers(RuleBasedStateMachine):
    """Requests of three prompts come, end, are cancelled, swapped out and interrupted, in any order."""

    def __init__(self) -> None:
        super().__init__()
        model: Any = CheapModel()
        self.engine = Engine(model, sizes=Sizes(4, True, POSITIONS + 1, 64, 13, 6), prefill_tokens=1)
        self.live: list[tuple[Handle, Request]] = []

    @rule(
        number=st.integers(0, 9),
        frames=st.sampled_from((31, 40, 64)),
        most=st.sampled_from((3, 20, 70)),
        scale=st.sampled_from((3.0, 3.0, 3.0, None)),
        guided=st.sampled_from((None, None, 2, 30)),
    )
    def submit(self, number: int, frames: int, most: int, scale: float | None, guided: int | None) -> None:
        seed = BAD if number == 9 else number
        steps = None if scale is None else guided
        asked = spoken(number, voice(frames), most, guidance_scale=scale, guidance_steps=steps, seed=seed)
        self.live.append((self.engine.submit(asked), asked))

    @rule(times=st.integers(1, 30))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()
            poison(self.engine)
            assert_sound(self.engine)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.live))[0].cancel()

    @precondition(lambda self: self.engine._running)
    @rule(what=st.sampled_from(("decode_step", "prefill", "store_text")), ours=st.booleans())
    def broken(self, what: str, ours: bool) -> None:
        error, model = ArithmeticError() if ours else KeyboardInterrupt(), vars(self.engine.model)

        def breaks(*args: Any, **named: Any) -> None:
            del model[what]
            raise error

        model[what] = breaks
        try:
            self.engine.step()
        except KeyboardInterrupt:
            pass
        finally:
            model.pop(what, None)

    @invariant()
    def pages_are_accounted_for(self) -> None:
        assert_sound(self.engine)

    def teardown(self) -> None:
        run_to_end(self.engine)
        assert_sound(self.engine)
        assert self.engine.stats.pages == self.engine.stats.text_pages == 0
        for handle, asked in self.live:
            assert handle.done and not isinstance(handle.error, OutOfPages)
            if handle.status == "done":
                assert_same(handle.result(), alone_cheaply(asked))


Speakers.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSpeakers = Speakers.TestCase


def test_one_that_was_swapped_out_shares_again() -> None:
    """Three requests of one prompt want more pages than there are."""
    model: Any = CheapModel(ends=False)
    engine = Engine(model, sizes=Sizes(3, True, POSITIONS + 1, 64, 18, 6))
    asked = [spoken(number, voice(64), 50 + 10 * number) for number in range(3)]
    handles = [engine.submit(request) for request in asked]
    swapped = shared = 0
    while engine.step():
        assert_sound(engine)
        poison(engine)
        swapped = max(swapped, engine.stats.swapped)
        if swapped and not engine.stats.swapped and engine.stats.running > 1:
            rows = [engine.state.unconditional(run.table_idx) for run in engine._running]
            pages = [engine.state.blocks.held_pages(row)[: 64 // PAGE_SIZE] for row in rows]
            shared += all(page == pages[0] for page in pages)
    assert swapped and shared
    for handle, request in zip(handles, asked, strict=True):
        assert_same(handle.result(), alone_cheaply(request, ends=False))
