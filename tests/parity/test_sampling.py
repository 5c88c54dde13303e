"""The distribution that is drawn from, against transformers' logits processors on the same logits."""

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DiaForConditionalGeneration, GenerationConfig

from bench.tools.tiny_models import tiny_config, transformers_model
from dia_kernels.reference import sample_weights

CONFIG = tiny_config()
CHANNELS, VOCAB, EOS = CONFIG.decoder.num_channels, CONFIG.decoder.vocab_size, CONFIG.decoder.eos_token_id


@pytest.fixture(scope="module")
def theirs() -> DiaForConditionalGeneration:
    return transformers_model(CONFIG)


def their_probabilities(
    model: DiaForConditionalGeneration,
    logits: Tensor,
    guidance_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> Tensor:
    """`[batch, channels, vocab]`, from the chain of processors that `generate` would build for these settings."""
    batch = logits.shape[0] // (2 if guidance_scale != 1 else 1)
    chosen = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale, max_length=999
    )
    chain = model._get_logits_processor(chosen, input_ids_seq_length=1, logits_processor=[], device="cpu")
    scores = chain(torch.zeros(batch * CHANNELS, 1, dtype=torch.long), logits.reshape(-1, VOCAB).clone())
    return scores.softmax(-1).view(batch, CHANNELS, VOCAB)


def our_probabilities(
    logits: Tensor, guidance_scale: float, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    batch = logits.shape[0] // (2 if guidance_scale != 1 else 1)
    weights = sample_weights(
        logits,
        torch.full((batch,), guidance_scale),
        torch.full((batch,), temperature),
        torch.full((batch,), top_k or 0, dtype=torch.int32),
        torch.full((batch,), top_p),
        eos=EOS,
    )
    return weights.double() / weights.sum(-1, keepdim=True)


def random_logits(rows: int, spread: float, special: float) -> Tensor:
    """`[rows, channels, vocab]`; special: added to EOS and what follows it."""
    logits = spread * torch.randn(rows, CHANNELS, VOCAB)
    logits[..., EOS:] += special
    return logits


def rounding(logits: Tensor, guidance_scale: float, temperature: float) -> float:
    """Largest difference of a probability that the rounding of guided logits in float32 can make.

    `cond + scale * (cond - uncond)` is rounded three times, by at most 2^-24 of its size each (once less where a
    processor fuses the product with the sum), on either side; a softmax turns an absolute error of a logit into twice
    that relative error of a probability.
    """
    logits = logits.double()
    size = logits.abs()
    if guidance_scale != 1:
        cond, uncond = logits.chunk(2)
        size = cond.abs() + guidance_scale * (cond - uncond).abs()
    error = 2 * 3 * 2**-24 * float(size[size.isfinite()].max()) / temperature
    return 1e-6 + math.expm1(2 * error)


def assert_equal_probabilities(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to the tolerance, except that an id at the very edge of the nucleus may be in on one side only.

    Both sides add up what comes before an id and compare with top_p; where that is a tie to the last bit of float32,
    the order of addition decides.
    """
    differing = ((ours - expected).abs() > tolerance).any(-1)
    for mine, other in zip(ours[differing], expected[differing], strict=True):
        support = (mine > 0).sum() - (other > 0).sum()
        assert abs(int(support)) == 1, "more than one id differs"
        longer, shorter = (mine, other) if support > 0 else (other, mine)
        shared = longer * (shorter > 0)
        assert ((shared / shared.sum()) - shorter).abs().max() < tolerance
    assert differing.sum() <= 1, "ties that close are rare"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(guidance_scale=1.5, temperature=1.2, top_k=None, top_p=1.0, spread=20.0, special=-9.0, seed=0)
@given(
    guidance_scale=st.sampled_from((1.0, 1.5, 3.0, 4.0)),
    temperature=st.sampled_from((1.0, 1.2, 1.8, 5.0)),
    top_k=st.sampled_from((None, 1, 2, 45, 1000, VOCAB)),
    top_p=st.sampled_from((1.0, 0.95, 0.9, 0.5, 0.05)),
    spread=st.sampled_from((0.5, 3.0, 20.0)),
    special=st.sampled_from((-9.0, 0.0, 5.0)),
    seed=st.integers(0, 2**20),
)
def test_probabilities(
    theirs: DiaForConditionalGeneration,
    guidance_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float,
    spread: float,
    special: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    logits = random_logits(4, spread, special)
    chosen = (guidance_scale, temperature, top_k, top_p)
    expected = their_probabilities(theirs, logits, *chosen)
    candidates = expected.isfinite().all(-1, keepdim=True)  # without any, transformers divides 0 by 0
    ours = our_probabilities(logits, *chosen)
    tolerance = rounding(logits, guidance_scale, temperature)
    assert_equal_probabilities(ours * candidates, torch.where(candidates, expected, 0.0), tolerance)


def test_special_ids_count_among_the_top_k_though_none_can_be_drawn(theirs: DiaForConditionalGeneration) -> None:
    """Top-k of the guided logits comes before special ids go: they take places, and fewer than k candidates remain.

    So the heads' rows of ids that can never be drawn have to be computed all the same.
    """
    logits = random_logits(2, 1.0, 20.0)
    logits[1] = 0
    chosen = (3.0, 1.2, 10, 1.0)
    ours, expected = our_probabilities(logits, *chosen), their_probabilities(theirs, logits, *chosen)
    assert (ours[0, 1:] > 0).sum(-1).tolist() == [10 - (VOCAB - EOS)] * (CHANNELS - 1)
    assert_equal_probabilities(ours, expected, rounding(logits, 3.0, 1.2))
    logits[..., EOS + 1 :] = -99  # without them, others would move up
    assert (our_probabilities(logits, *chosen)[0, 1:] > 0).sum(-1).tolist() == [10 - 1] * (CHANNELS - 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_eos_alone_or_not_at_all(theirs: DiaForConditionalGeneration, guidance_scale: float) -> None:
    logits = random_logits(2, 1.0, 0.0)
    for lead, alone in ((0.01, True), (-0.01, False)):
        for row in logits:
            row[0, EOS] = row[0, :EOS].max() + lead
        if guidance_scale != 1:
            logits[1] = 0.9 * logits[0]
        chosen = (guidance_scale, 1.2, 45, 0.95)
        ours = our_probabilities(logits, *chosen)
        assert ours[0, 0, EOS] == (1 if alone else 0)
        expected = their_probabilities(theirs, logits, *chosen)
        assert_equal_probabilities(ours, expected, rounding(logits, guidance_scale, 1.2))
