"""Hooks in the step: nothing without them, rows that belong to their requests, and no waiting."""

import random
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dia_fast import Dia, TextWarning
from dia_fast.engine import Engine, Generation, Hooks, Request, StepFailed, StepTensors
from dia_fast.errors import InputError
from dia_fast.model.decode_state import Sizes
from dia_fast.model.model import DiaModel
from dia_kernels import reference
from tests.helpers.schedules import (
    CHANNELS,
    POSITIONS,
    alone,
    assert_same,
    assert_sound,
    numbered_request,
    run_to_end,
    small_config,
    small_model,
)
from tests.helpers.virtual_device import VirtualDevice

VOCAB, EOS = small_config().decoder.vocab_size, small_config().decoder.eos_token_id
LAYERS = small_config().decoder.num_hidden_layers


def nothing(step: StepTensors) -> None:
    pass


def spoken(hooks: Hooks | None, requests: list[Request], **options: Any) -> list[Generation]:
    engine = Engine(small_model(), hooks=hooks, **{"max_batch": 4} | options)
    handles = [engine.submit(request) for request in requests]
    return [handle.result() for handle in handles]


def op_calls(hooks: Hooks | None) -> list[str]:
    """The ops of a run, in order."""
    calls: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return getattr(reference, name)(*given, **named)

        return call

    ops = SimpleNamespace(name="torch", **{name: noting(name) for name in reference.__all__})
    ops.attention_workspace = reference.attention_workspace
    model = DiaModel(small_config(), ops).load(small_model().state_dict())  # type: ignore[arg-type]
    engine = Engine(model, max_batch=1, hooks=hooks)
    handle = engine.submit(Request([5, 6], None, 9, seed=1))
    calls.clear()
    handle.result()
    steps = calls[calls.index("embed_codes") :]
    assert len(steps) == engine.steps * (8 * LAYERS + (2 if hooks and hooks.sample else 3))
    return steps


def test_hooks_cost_nothing_where_they_are_absent() -> None:
    """The same launches, buffers and bits."""
    plain = op_calls(None)
    assert op_calls(Hooks()) == op_calls(Hooks(in_step=nothing)) == plain
    assert op_calls(Hooks(sample=nothing)) == [name for name in plain if name != "sample"]
    assert Engine(small_model()).state.extras == {}
    for hooks in (None, Hooks(), Hooks(in_step=nothing, after_step=lambda *_: None, extras={"x": torch.zeros(2)})):
        for number, ours in enumerate(spoken(hooks, [numbered_request(number) for number in range(6)])):
            assert_same(ours, alone(number))


def favour(step: StepTensors) -> None:
    """Add each request's own bias to its logits."""
    step.cond.add_(step.extras["bias"])
    if step.uncond is not None:
        step.uncond.add_(step.extras["bias"])


def biased(number: int) -> Request:
    generator = torch.Generator().manual_seed(number)
    bias = 3 * torch.randn(CHANNELS, VOCAB, generator=generator)
    return numbered_request(number, extras={"bias": bias} if number % 4 else None)


BIAS = Hooks(in_step=favour, extras={"bias": torch.zeros(CHANNELS, VOCAB)})


@lru_cache
def biased_alone(number: int) -> Generation:
    return spoken(BIAS, [biased(number)])[0]


@settings(max_examples=6, deadline=None)
@example([1, 2, 3, 5, 6, 7], 14, random.Random(0))
@example([9, 3, 2, 1, 11, 4], 40, random.Random(1))
@given(st.lists(st.integers(0, 12), min_size=4, max_size=7), st.sampled_from([14, 40]), st.randoms())
def test_extras_move_with_their_requests(numbers: list[int], pages: int, dice: random.Random) -> None:
    """In any company, though rows move, and requests are swapped out, cancelled and come to the same rows again."""
    engine = Engine(small_model(), sizes=Sizes(3, True, POSITIONS + 1, 96, pages, 9), hooks=BIAS)
    handles = [(number, engine.submit(biased(number))) for number in numbers]
    while engine.step():
        assert_sound(engine)
        running = [handle for _, handle in handles if handle.status == "running"]
        if running and dice.random() < 0.05:
            dice.choice(running).cancel()
    for number, handle in handles:
        if handle.status != "cancelled":
            assert_same(handle.result(), biased_alone(number))


def test_extras_reach_the_step() -> None:
    differ = [not torch.equal(biased_alone(number).delayed_codes, alone(number).delayed_codes) for number in range(8)]
    assert not differ[0] and not differ[4] and sum(differ) >= 5


def likeliest(step: StepTensors) -> None:
    """Take the likeliest sound of each channel, whatever the request asks for; no speech ends by itself."""
    step.sampled.copy_(step.cond[..., :EOS].argmax(-1))


def test_a_sampler_of_ones_own() -> None:
    requests = [numbered_request(number, temperature=1.5) for number in range(5)]
    greedy = [numbered_request(number, temperature=0.0, guidance_scale=None, max_new_tokens=40) for number in range(5)]
    for ours in spoken(Hooks(sample=likeliest), requests):
        assert ours.truncated
    model = small_model(eos=0.0)
    for request in greedy:
        ends = [
            Engine(model, max_batch=1, hooks=hooks).submit(request).result()
            for hooks in (Hooks(sample=likeliest), None)
        ]
        assert_same(*ends)


def test_after_each_step_the_host_is_told_whose_rows_are_whose() -> None:
    """Of every step, the last one too: what a row has sampled is in the codes of its request."""
    seen: dict[int, dict[int, list[int]]] = defaultdict(dict)

    def note(step: StepTensors, numbers: tuple[int, ...]) -> None:
        assert step.number[: len(numbers)].tolist() == list(numbers)
        assert (step.number[len(numbers) :] == -1).all() and step.batch >= len(numbers)
        assert not step.active[len(numbers) :].any()
        for row, number in enumerate(numbers):
            at = int(step.step[row]) - 1
            seen[number].setdefault(at, step.codes[row, at].tolist())

    engine = Engine(small_model(), max_batch=3, hooks=Hooks(after_step=note), capture=lambda step: step)
    handles = [engine.submit(numbered_request(number)) for number in range(9)]
    run_to_end(engine)
    for handle in handles:
        codes = handle.result().delayed_codes
        first = 0 if handle.request.prompt is None else len(handle.request.prompt)
        assert seen[handle.number] == {at: codes[at].tolist() for at in range(first, len(codes))}


def test_hooks_do_not_hold_the_host_back() -> None:
    device = VirtualDevice(1e-3)
    total = torch.zeros(1)

    def after(step: StepTensors, numbers: tuple[int, ...]) -> None:
        assert device._active, "it runs on the engine's stream"
        total.add_(step.logits.max())

    ends = {}
    for name, hooks in {"without": None, "with": Hooks(in_step=favour, after_step=after, extras=BIAS.extras)}.items():
        device = VirtualDevice(1e-3)
        engine = Engine(small_model(), max_batch=2, device=device, hooks=hooks)
        handles = [engine.submit(numbered_request(number, longest=60)) for number in (1, 2)]
        for handle in handles:
            handle.result()
        ends[name] = device.clock
        assert device.in_flight == 2 and not device.outside
    assert ends["with"] == pytest.approx(ends["without"], rel=0.01)


@pytest.mark.parametrize("padded", [False, True])
def test_a_captured_step_holds_the_hooks(padded: bool) -> None:
    """Of a bucket larger than the batch as well, whose other rows are inert."""
    capture = (lambda step: step) if padded else None
    requests = [biased(number) for number in (1, 2, 3)]
    for request, ours in zip(requests, spoken(BIAS, requests, capture=capture), strict=True):
        assert_same(ours, spoken(BIAS, [request])[0])


def failing(*_: Any) -> None:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize("name", ["in_step", "sample", "after_step"])
def test_an_error_in_a_hook_ends_the_requests_of_its_step(name: str) -> None:
    engine = Engine(small_model(), max_batch=1, hooks=Hooks(**{name: failing}))
    handles = [engine.submit(numbered_request(number)) for number in (1, 2)]
    for handle in handles:
        with pytest.raises(StepFailed, match="planted") as caught:
            handle.result()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert_sound(engine)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"in_step": 3}, "in_step must be a function or None, not 3"),
        ({"extras": [1]}, "extras must be a dict"),
        ({"extras": {"number": torch.zeros(1)}}, "'number' cannot be a name"),
        ({"extras": {"x": 1.0}}, "x must be a tensor, the value at first, not 1.0"),
    ],
)
def test_hooks_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Hooks(**given)


@pytest.mark.parametrize(
    ("extras", "said"),
    [
        ({"y": 1.0}, r"the hooks of this engine have no 'y'; they have \['bias', 'count', 'few'\]"),
        ({"bias": torch.zeros(2)}, r"bias must be torch.float32 of shape \[3, 40\], not torch.float32 of shape \[2\]"),
        ({"count": 0.5}, r"count must be torch.int64 of shape \[\], not torch.float64"),
        ({"count": "many"}, r"count must be torch.int64, not 'many'"),
        ({"few": 2**40}, r"few has values that torch.int32 cannot hold: 1099511627776"),
        ([], "extras must be a dict of tensors by name"),
    ],
)
def test_extras_that_cannot_be(extras: Any, said: str) -> None:
    hooks = Hooks(extras={**BIAS.extras, "count": torch.tensor(0), "few": torch.tensor(0, dtype=torch.int32)})
    engine = Engine(small_model(), max_batch=1, hooks=hooks)
    with pytest.raises(InputError, match=said):
        engine.submit(Request([1], extras=extras))
    with pytest.raises(InputError, match="extras"):
        Engine(small_model(), max_batch=1).submit(Request([1], extras=extras or [1]))


def test_values_are_those_at_the_time_of_submission() -> None:
    engine = Engine(small_model(), max_batch=1, hooks=BIAS)
    bias = 3 * torch.randn(CHANNELS, VOCAB)
    request = numbered_request(1, extras={"bias": bias.clone()})
    changed = numbered_request(1, extras={"bias": bias})
    handle = engine.submit(changed)
    bias.zero_()
    assert_same(handle.result(), spoken(BIAS, [request])[0])


def test_values_at_first_are_those_of_the_engine_s_beginning() -> None:
    first = torch.zeros(CHANNELS, VOCAB)
    engine = Engine(small_model(), max_batch=1, hooks=Hooks(in_step=favour, extras={"bias": first}))
    handle = engine.submit(numbered_request(1))
    first.normal_().mul_(3)
    assert_same(handle.result(), spoken(BIAS, [numbered_request(1)])[0])


def test_an_engine_takes_hooks_alone() -> None:
    with pytest.raises(InputError, match="hooks must be a dia_fast.engine.Hooks"):
        Engine(small_model(), hooks=favour)  # type: ignore[arg-type]


def test_dia_takes_hooks() -> None:
    seen: list[int] = []
    with Dia(small_model(), hooks=Hooks(in_step=lambda step: seen.append(step.batch))) as dia:
        with pytest.warns(TextWarning, match="was cut"):
            dia.generate_codes("[S1] Yes.", seed=1, max_new_tokens=9, retries=0)
    assert seen == [1] * len(seen) and len(seen) > 8
    with pytest.raises(InputError, match="hooks must be a dia_fast.engine.Hooks"):
        Dia(small_model(), hooks=favour)  # type: ignore[arg-type]
