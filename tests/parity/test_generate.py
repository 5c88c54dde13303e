"""Greedy generation row by row against transformers: prompts, ragged batches, guidance, the end of speech, the limit.

The weights are random, so the codes are noise, but hardly two rows are alike, and a wrong code anywhere changes
everything after it. `eos_gain` makes the end come early, late or never; each case checks that it came as intended.
"""

import functools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DiaForConditionalGeneration

from bench.tools.pairs import pair, random_prompts, random_texts, their_rows
from bench.tools.tiny_models import tiny_config
from dia_fast.engine import Generation, Request, generate
from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import undo_delay
from dia_fast.model.model import DiaModel

CONFIG = tiny_config()
TOKENS = CONFIG.decoder
MAX_DELAY = max(CONFIG.delay_pattern)


@functools.cache
def models(eos_gain: float) -> tuple[DiaForConditionalGeneration, DiaModel]:
    return pair(CONFIG, seed=1, eos_gain=eos_gain)


def compare(
    config: DiaConfig,
    both: tuple[DiaForConditionalGeneration, DiaModel],
    texts: Sequence[Sequence[int]],
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    guidance_scale: float | None,
    top_k: int | None = 45,
) -> list[Generation]:
    """Generate on both sides and assert equality: our rows are theirs, and nothing but padding follows in theirs."""
    theirs, model = both
    expected = their_rows(
        theirs, config, texts, prompts, max_new_tokens=max_new_tokens, guidance_scale=guidance_scale, top_k=top_k
    )
    requests = [
        Request(ids, prompt, max_new_tokens, guidance_scale, temperature=0.0, top_k=top_k)
        for ids, prompt in zip(texts, prompts, strict=True)
    ]
    results = generate(model, requests)
    for result, rows, prompt in zip(results, expected, prompts, strict=True):
        count = len(result.delayed_codes)
        assert torch.equal(result.delayed_codes.long(), rows[:count])
        assert (rows[count:] == config.decoder.pad_token_id).all()
        spoken = undo_delay(result.delayed_codes, config.delay_pattern, config.decoder.eos_token_id)
        assert torch.equal(result.frames, spoken[len(prompt) :])
        assert torch.equal(spoken[: len(prompt)], prompt[: len(spoken)])
    return results


@pytest.mark.parametrize(
    ("frames", "guidance_scale"),
    [([0], None), ([11], 3.0), ([0, 0], 3.0), ([9, 9], 1.0), ([0, 25, 4], 3.0)],
    ids=str,
)
def test_two_hundred_rows(frames: list[int], guidance_scale: float | None) -> None:
    texts, prompts = random_texts(CONFIG, [17, 5, 64][: len(frames)]), random_prompts(CONFIG, frames)
    results = compare(CONFIG, models(0.0), texts, prompts, 204, guidance_scale)
    for result, prompt in zip(results, prompts, strict=True):
        assert len(result.delayed_codes) == len(prompt) + 1 + 204 and result.truncated
        assert len(result.frames) == 204 - MAX_DELAY - 1
        assert len(result.delayed_codes[:, 0].unique()) > 80, "rows that repeat prove little"


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_some_end_early_some_late_and_some_never(guidance_scale: float) -> None:
    texts, prompts = random_texts(CONFIG, [3, 8, 13, 21, 34]), random_prompts(CONFIG, [0, 12, 0, 5, 20])
    results = compare(CONFIG, models(1.4), texts, prompts, 80, guidance_scale)
    ended = [result for result in results if not result.truncated]
    assert len({len(result.delayed_codes) for result in ended}) >= 3 and len(ended) < len(results), (
        "choose another seed"
    )
    for result in ended:
        row = int((result.delayed_codes[:, 0] == TOKENS.eos_token_id).nonzero()[0])
        assert len(result.delayed_codes) == row + MAX_DELAY + 1
        for channel, delay in enumerate(CONFIG.delay_pattern):
            tail = result.delayed_codes[row + delay :, channel].tolist()
            assert tail == [TOKENS.eos_token_id] + [TOKENS.pad_token_id] * (MAX_DELAY - delay)


@pytest.mark.parametrize("eos_gain", [0.0, 30.0], ids=["never", "at once"])
@pytest.mark.parametrize("max_new_tokens", [1, 14, 15, 16, 17, 33])
def test_the_length_limit(max_new_tokens: int, eos_gain: float) -> None:
    texts, prompts = random_texts(CONFIG, [7, 19]), random_prompts(CONFIG, [0, 6])
    results = compare(CONFIG, models(eos_gain), texts, prompts, max_new_tokens, 3.0)
    for result in results:
        assert len(result.frames) <= max(max_new_tokens - MAX_DELAY - 1, 0)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_delay_pattern_and_any_batch(data: st.DataObject) -> None:
    draw = data.draw
    channels = draw(st.integers(1, 6), label="channels")
    delay = (0, *draw(st.lists(st.integers(0, 7), min_size=channels - 1, max_size=channels - 1), label="delay"))
    decoder = {"num_channels": channels, "vocab_size": 36, "eos_token_id": 32, "pad_token_id": 33, "bos_token_id": 34}
    config = tiny_config(decoder=decoder | {"num_hidden_layers": 1}, delay_pattern=delay)
    both = pair(config, seed=draw(st.integers(0, 99), label="seed"), eos_gain=draw(st.sampled_from((0.0, 1.0, 1.5))))
    batch = draw(st.integers(1, 4), label="batch")
    texts = random_texts(config, [draw(st.integers(1, 30), label="text") for _ in range(batch)])
    prompts = random_prompts(config, [draw(st.integers(0, 20), label="prompt") for _ in range(batch)])
    scale = draw(st.sampled_from((None, 1.0, 1.5, 3.0, 10.0)), label="guidance")
    limit = draw(st.integers(1, 40), label="max_new_tokens")
    top_k = draw(st.sampled_from((None, 1, 5, 20)), label="top_k")
    compare(config, both, texts, prompts, limit, scale, top_k)
