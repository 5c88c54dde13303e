"""Sampled tokens: the distribution of transformers, and the same ones again from the same seed."""

import pytest
import torch
from scipy.stats import chisquare

from dia_fast.errors import InputError
from dia_fast.integrations.transformers import FallbackWarning, accelerate
from tests.integrations.models import TINY_VOCABULARY, greedy, inputs, make_model

DRAWS, BATCH = 5000, 1000
SAMPLED = greedy(do_sample=True, temperature=1.3, top_k=20, top_p=0.9, max_new_tokens=20)


@pytest.mark.parametrize("guidance_scale", [pytest.param(None, marks=pytest.mark.slow), 2.0])
def test_first_tokens_are_drawn_from_the_distribution_of_transformers(guidance_scale: float | None) -> None:
    """5,000 draws of three channels, against the scores that transformers' own processors give."""
    model = make_model(TINY_VOCABULARY)
    text = {"input_ids": torch.randint(1, 255, (1, 6))}
    settings = SAMPLED | {"guidance_scale": guidance_scale, "max_new_tokens": 1}
    scores = model.generate(**text, **settings, output_scores=True, return_dict_in_generate=True).scores[0]
    expected = scores.softmax(-1) * DRAWS
    accelerate(model)
    many = {"input_ids": text["input_ids"].repeat(BATCH, 1)}
    rows = torch.cat([model.generate(**many, **settings)[:, 1] for _ in range(DRAWS // BATCH)])
    for channel in range(3):
        counts = torch.bincount(rows[:, channel], minlength=36)
        assert not counts[expected[channel] == 0].any(), "a token that transformers excludes"
        likely = expected[channel] >= 5
        seen = torch.cat([counts[likely], counts[~likely].sum()[None]]).double()
        wanted = torch.cat([expected[channel][likely], expected[channel][~likely].sum()[None]]).double()
        wanted *= DRAWS / wanted.sum()
        kept = wanted > 0
        assert likely.sum() > 3 and chisquare(seen[kept], wanted[kept]).pvalue > 1e-4


def test_seeds() -> None:
    model = accelerate(make_model(TINY_VOCABULARY))
    batch = inputs(TINY_VOCABULARY, texts=(4, 4, 4), prompts=(0, 0, 0))
    batch["input_ids"][:] = batch["input_ids"][0]
    torch.manual_seed(7)
    first, second = (model.generate(**batch, **SAMPLED) for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    torch.manual_seed(7)
    assert torch.equal(model.generate(**batch, **SAMPLED), first)

    state = torch.get_rng_state()
    rows = model.generate(**batch, **SAMPLED, seed=11)
    assert torch.equal(rows, model.generate(**batch, **SAMPLED, seed=11))
    assert torch.equal(rows[0], rows[1]), "one seed and one text: one voice"
    mixed = model.generate(**batch, **SAMPLED, seed=[11, 12, 13])
    assert torch.equal(mixed[0][: rows.shape[1]], rows[0][: mixed.shape[1]]) and not torch.equal(mixed[0], mixed[1])
    alone = model.generate(**{name: tensor[1:2] for name, tensor in batch.items()}, **SAMPLED, seed=12)[0]
    assert torch.equal(alone, mixed[1][: len(alone)]), "alone as in the batch"
    model.generate(**batch, **greedy(max_new_tokens=5, top_k=30))
    assert torch.equal(torch.get_rng_state(), state), "explicit seeds and greedy decoding leave torch's numbers alone"


def test_bad_seeds() -> None:
    model = accelerate(make_model(TINY_VOCABULARY))
    batch = inputs(TINY_VOCABULARY, texts=(4, 4), prompts=(0, 0))
    with pytest.raises(InputError, match="seed has 3 entries for 2 texts"):
        model.generate(**batch, **SAMPLED, seed=[1, 2, 3])
    with pytest.raises(InputError, match="seed must be from -1 to"):
        model.generate(**batch, **SAMPLED, seed=-2)


def test_a_seed_counts_on_the_models_own_way_too() -> None:
    model = accelerate(make_model(TINY_VOCABULARY))
    batch = inputs(TINY_VOCABULARY, texts=(4, 4), prompts=(0, 0))
    settings = SAMPLED | {"repetition_penalty": 1.2}
    with pytest.warns(FallbackWarning):
        first, second = (model.generate(**batch, **settings, seed=5) for _ in range(2))
        assert torch.equal(first, second)
        with pytest.raises(InputError, match="list of seeds"):
            model.generate(**batch, **settings, seed=[1, 2])
