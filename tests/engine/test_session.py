"""Steps under a program's control: several in one pass to the bit, some layers only, and back again."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.tools.tiny_models import tiny_config
from dia_fast.engine import Generation, Request, Session, Verified, generate
from dia_fast.engine.decode_graphs import Capture
from dia_fast.errors import InputError, NumericError
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops, reference
from tests.helpers.schedules import CHANNELS, assert_same, numbered_request, small_config, small_model

VOCAB = small_config().decoder.vocab_size


def numbered(number: int) -> Request:
    return numbered_request(number, longest=33, guidance_steps=None)


def single(request: Request) -> Generation:
    return generate(small_model(), [request])[0]


def drafted(session: Session, count: int, dice: torch.Generator | None = None) -> torch.Tensor:
    """Drafts as plain steps would sample them; with dice some are spoiled."""
    before, drafts = session.save(), []
    for _ in range(count):
        session.step()
        draft = session.tensors.sampled.clone()
        if dice is not None:
            wrong = torch.rand(draft.shape, generator=dice) < 0.05
            draft = torch.where(wrong, torch.randint(0, VOCAB, draft.shape, generator=dice), draft)
        drafts.append(draft)
    session.restore(before)
    return torch.stack(drafts)


def test_plain_steps_are_those_of_an_engine() -> None:
    requests = [numbered(number) for number in range(6)]
    session = Session(small_model(), requests)
    while not session.done:
        session.step()
    for ours, request in zip(session.results(), requests, strict=True):
        assert_same(ours, single(request))


@pytest.mark.parametrize("capture", [None, lambda step: step], ids=["launches", "captured"])
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 7), st.integers(0, 99))
@example([2, 8], 7, 0)
def test_codes_are_those_of_plain_steps(capture: Capture | None, numbers: list[int], count: int, seed: int) -> None:
    """With right and wrong drafts, greedy or sampled, guided or not, from a prompt, and over the end of speech."""
    requests = [numbered(number) for number in numbers]
    dice = torch.Generator().manual_seed(seed)
    session = Session(small_model(), requests, capture=capture)
    while not session.done:
        step, running = session.tensors.step.clone(), session.tensors.active
        accepted = session.verify(drafted(session, count, dice)).agreed.cumprod(0).sum(0)
        assert torch.equal(session.tensors.step - step, torch.where(running, accepted + 1, 0))
        assert not accepted[~running].any()
    for ours, request in zip(session.results(), requests, strict=True):
        assert_same(ours, single(request))


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_bits_of_plain_steps(guidance_scale: float | None, dtype: torch.dtype) -> None:
    request = Request([3, 7], None, 40, guidance_scale, seed=5)
    session, plain = (Session(small_model(dtype, eos=0.0), [request]) for _ in range(2))
    for count in (1, 5, 7, 3):
        verified = session.verify(drafted(session, count))
        assert verified.agreed.all() and verified.agreed.shape == (count, 1)
        for logits, sampled in zip(verified.logits, verified.sampled, strict=True):
            plain.step()
            assert torch.equal(logits, plain.tensors.logits) and torch.equal(sampled, plain.tensors.sampled)
    assert session.tensors.step.tolist() == plain.tensors.step.tolist() == [20]


def test_drafts_are_accepted_up_to_the_first_wrong_one() -> None:
    """Of each request by itself; what is wrong where the prompt decides is not wrong."""
    requests = [Request([number], None, 60, seed=number) for number in (1, 2, 3)]
    session = Session(small_model(eos=0.0), requests)
    drafts = drafted(session, 6)
    drafts[0, :, -1] += 1  # channel 2 speaks from step 3 on
    drafts[4, 1, 0] = (drafts[4, 1, 0] + 1) % 30
    drafts[3, 2] = (drafts[3, 2] + 1) % 30
    verified = session.verify(drafts)
    assert verified.agreed.cumprod(0).sum(0).tolist() == [6, 4, 3]
    assert session.tensors.step.tolist() == [7, 5, 4]
    session.verify(drafts.zero_(), lambda verified: torch.tensor([0, 9, -1]))
    assert session.tensors.step.tolist() == [8, 12, 5], "a rule of one's own; not more than there are"


def test_weights_are_read_once_in_a_pass() -> None:
    calls = Counter[str]()

    def counting(name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return getattr(reference, name)(*given, **named)

        return call

    ops = SimpleNamespace(name="torch", **{name: counting(name) for name in reference.__all__})
    ops.attention_workspace = reference.attention_workspace
    plain = small_model(eos=0.0)
    model = DiaModel(plain.config, ops).load(plain.state_dict())  # type: ignore[arg-type]
    session = Session(model, [Request([1], None, 40, seed=1)])
    drafts = drafted(session, 4)
    calls.clear()
    session.verify(drafts)
    once = {"rms_norm_linear": 2, "linear_residual": 3, "cross_attention": 1, "rms_norm_glu": 1, "codebook_logits": 1}
    assert calls == once | {"embed_codes": 5, "rope_attention": 10, "sample": 5}


def several_layers(chosen: tuple[int, ...] = (0, 1, 2, 3)) -> DiaModel:
    """A model of four layers, or one that has only some of them."""
    whole = tiny_config({"num_hidden_layers": 1}, {"num_hidden_layers": 4})
    generator, weights = torch.Generator().manual_seed(2), {}
    for name, shape in fused_shapes(whole).items():
        values = torch.randn(shape, generator=generator)
        weights[name] = values * 0.7 * shape[-1] ** -0.5 if len(shape) == 2 else 1 + 0.1 * values
    names = {f"decoder.layers.{new}.": f"decoder.layers.{old}." for new, old in enumerate(chosen)}
    config = replace(whole, decoder=replace(whole.decoder, num_hidden_layers=len(chosen)))
    found = {}
    for name in fused_shapes(config):
        new = next((new for new in names if name.startswith(new)), "")
        found[name] = weights[names[new] + name.removeprefix(new) if new else name]
    return DiaModel(config, get_ops("torch")).load(found)


@pytest.mark.parametrize("chosen", [(0, 3), (1, 2, 3), (0, 1, 2, 3), ()])
def test_a_step_of_some_layers_is_one_of_a_model_that_has_no_others(chosen: tuple[int, ...]) -> None:
    request = Request([7, 8], None, 30, seed=3)
    session = Session(several_layers(), [request])
    while not session.done:
        session.step(layers=chosen[::-1])
    if chosen:
        assert_same(session.results()[0], generate(several_layers(chosen), [request])[0])
    else:
        assert len(session.results()[0].delayed_codes) > 3, "the heads of what is embedded"


def test_layers_that_were_passed_by_are_computed_by_a_pass() -> None:
    """Drafts of few layers, all codes those of all layers."""
    request = Request([7, 8], None, 20, seed=3, temperature=0.0)
    session = Session(several_layers(), [request], capture=lambda step: step)
    session._state.pool.all_keys.fill_(torch.nan)
    session._state.pool.all_values.fill_(torch.nan)
    while not session.done:
        before, drafts = session.save(), []
        for _ in range(3):
            session.step(layers=(0, 1, 2))
            drafts.append(session.tensors.sampled.clone())
        session.restore(before)
        session.verify(torch.stack(drafts))
    assert_same(session.results()[0], generate(several_layers(), [request])[0])


def test_logits_that_are_no_numbers_count_where_they_are_accepted() -> None:
    model = small_model(eos=0.0)
    broken = DiaModel(model.config, model.ops).load({name: value.clone() for name, value in model.state_dict().items()})
    session = Session(broken, [Request([1], None, 30, seed=1)])
    drafts = drafted(session, 3)
    wrong = int(drafts[2, 0, 0])
    assert wrong not in drafts[:2, 0, 0]
    broken.decoder.embedding[wrong] = torch.nan
    session.verify(drafts, lambda verified: torch.tensor([2]))
    assert len(session.results()[0].delayed_codes) == 3
    session.verify(drafts, lambda verified: torch.tensor([0]))
    with pytest.raises(NumericError, match="step 4 "):
        session.results()


DRAFTS = torch.zeros(2, 1, CHANNELS, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda session: session.verify(DRAFTS[0]), r"drafts must be integers of shape \[drafts, 1, 3\]"),
        (lambda session: session.verify(DRAFTS.float()), "drafts must be integers"),
        (lambda session: session.verify([[1]]), "drafts must be integers"),
        (lambda session: session.verify(DRAFTS[:0]), "from 1 to 31 can be verified"),
        (lambda session: session.verify(DRAFTS.repeat(16, 1, 1)), "drafts: 32 for each request; from 1 to 31"),
        (lambda session: session.verify(DRAFTS, accept=3), "accept must be a function, not 3"),
        (lambda session: session.step(layers=[1]), "there is no layer 1; the decoder has 1"),
        (lambda session: session.step(layers=[-1]), "layers must be at least 0, not -1"),
        (lambda session: session.step(layers=["all"]), "layers must be a whole number, not 'all'"),
        (lambda session: Session(session.model, []), "requests make 0 batch rows; from 1 to 64"),
        (lambda session: Session(session.model, [Request([1])] * 33), "requests make 66 batch rows"),
        (lambda session: Session(session.model, [Request([1], guidance_steps=3)]), "are for an Engine"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(Session(small_model(), [Request([1], None, 9)]))


def test_what_verify_returns_is_public() -> None:
    verified = Session(small_model(), [Request([1], None, 9)]).verify(DRAFTS)
    assert isinstance(verified, Verified) and verified.logits.shape == (3, 2, CHANNELS, VOCAB)
    assert torch.equal(verified.drafts, DRAFTS)
