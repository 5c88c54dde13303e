"""Guidance in the first steps only: the codes of two requests, half the rows afterwards, pages given back."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_fast.engine import Engine, EngineEvent, Request, generate
from dia_fast.errors import InputError
from dia_fast.model.model import DiaModel
from dia_kernels import reference
from tests.helpers.schedules import CHANNELS, EOS, assert_same, assert_sound, run_to_end, small_model

STEPS = 30


def request(seed: int, frames: int = 0, **more: Any) -> Request:
    prompt = torch.arange(frames * CHANNELS).view(frames, CHANNELS) % EOS if frames else None
    return Request([5, seed + 1, 9], prompt, **{"max_new_tokens": 70, "top_k": 4, "seed": seed} | more)


def continued(model: DiaModel, whole: Request, steps: int) -> torch.Tensor:
    """The delayed codes of two requests: one with guidance, and one without it that goes on from its codes."""
    first = 0 if whole.prompt is None else len(whole.prompt)
    [begun] = generate(model, [whole])
    begin = begun.delayed_codes[: first + steps + 1]
    left = whole.max_new_tokens - steps
    rest = Request(
        whole.text_ids, None, left, None, whole.temperature, whole.top_k, whole.top_p, whole.seed, delayed_codes=begin
    )
    return generate(model, [rest])[0].delayed_codes


@pytest.mark.parametrize(
    "chosen", [{}, {"temperature": 0.0, "guidance_scale": 9.0}, {"frames": 33, "top_k": None}, {"guidance_scale": 1.5}]
)
def test_the_codes_are_those_of_two_requests(chosen: dict[str, Any]) -> None:
    model = small_model(eos=0.0)  # no speech ends by itself
    limited = request(3, guidance_steps=STEPS, **chosen)
    [ours] = generate(model, [limited])
    whole = request(3, **chosen)
    assert torch.equal(ours.delayed_codes, continued(model, whole, STEPS))
    [guided] = generate(model, [whole])
    assert not torch.equal(ours.delayed_codes, guided.delayed_codes), "guidance makes a difference"
    assert torch.equal(*(side.delayed_codes[: STEPS + 1] for side in (ours, guided)))
    company = [request(1), limited, request(2, guidance_scale=None), request(4, guidance_steps=5)]
    assert_same(generate(model, company)[1], ours)


@settings(max_examples=8, deadline=None)
@given(st.integers(4, 66), st.integers(0, 40))
def test_any_number_of_steps(steps: int, frames: int) -> None:
    model = small_model(eos=0.0)
    [ours] = generate(model, [request(8, frames, guidance_steps=steps)])
    assert torch.equal(ours.delayed_codes, continued(model, request(8, frames), steps))


@pytest.mark.parametrize("steps", [STEPS, 40])
def test_half_the_rows_are_computed_afterwards_and_pages_come_back(steps: int) -> None:
    plain, rows = small_model(eos=0.0), defaultdict[str, list[int]](list)

    def counting(name: str) -> Any:
        def call(x: torch.Tensor, *more: Any, **named: Any) -> Any:
            rows[name].append(len(x))
            return getattr(reference, name)(x, *more, **named)

        return call

    counted = ("rms_norm_linear", "linear_residual", "rms_norm_glu", "rope_attention", "codebook_logits", "sample")
    ops = SimpleNamespace(**{name: getattr(reference, name) for name in reference.__all__}, name="torch")
    model = DiaModel(plain.config, ops).load(plain.state_dict())  # type: ignore[arg-type]
    for name in counted:
        setattr(ops, name, counting(name))
    engine = Engine(model, max_batch=1)
    handle = engine.submit(request(3, guidance_steps=steps))
    pages = []
    while engine.step():
        assert_sound(engine)
        pages.append(engine.stats.pages)
    taken = engine.steps
    assert len(handle.result().delayed_codes) == 71 and taken == 71
    for name in ("rms_norm_glu", "rope_attention", "codebook_logits", "sample"):
        assert rows[name] == [2] * steps + [1] * (taken - steps), name
    # A page holds 32 tokens. After a step there is room for the next one; without guidance one page is spare.
    assert pages == [2 * (-(-step // 32)) if step <= steps else 1 + -(-step // 32) for step in range(1, 71)]
    run_to_end(engine)
    assert not engine.stats.pages


def test_another_request_gets_the_pages() -> None:
    """Two requests have room that would not have it with guidance to the end."""
    model = small_model(eos=0.0)
    size = Engine(model, max_batch=2).state.pool.shape.bytes(torch.float32)
    text = Engine(model, max_batch=2).state.cross_pool.shape.bytes(torch.float32)
    swapped: dict[int | None, int] = {}
    for steps in (None, 10):
        events = list[EngineEvent]()
        engine = Engine(model, max_batch=2, memory=9 * size + 4 * text, on_event=events.append)
        handles = [engine.submit(request(seed, max_new_tokens=90, guidance_steps=steps)) for seed in (1, 2)]
        for handle in handles:
            assert_same(handle.result(), generate(model, [handle.request])[0])
        swapped[steps] = sum(event.kind == "swapped_out" for event in events)
    assert swapped[None] and not swapped[10]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"guidance_steps": 0}, "guidance_steps must be"),
        ({"guidance_steps": 1.5}, "guidance_steps must be"),
        ({"guidance_steps": 3, "guidance_scale": None}, "guidance_steps: the request has no guidance"),
    ],
)
def test_what_cannot_be_is_refused(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        request(1, **chosen)
