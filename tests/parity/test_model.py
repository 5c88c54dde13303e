"""Logits against transformers with the same weights, teacher-forced: whole sequences and step by step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.tools.pairs import pair, random_grid, random_prompts, random_texts, their_logits
from bench.tools.tiny_models import tiny_config
from dia_fast.engine import Request, place, plan, prefill
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState, Sizes
from dia_fast.model.delay import FREE
from dia_fast.model.model import DiaModel

TOLERANCE = 1e-4  # of the largest logit, in float32


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert theirs.std() > 0.1, "logits that hardly differ prove nothing"
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def decoded_logits(model: DiaModel, texts: Sequence[Sequence[int]], rows: Tensor, prompt: int = 0) -> Tensor:
    """`[2 * batch, steps, channels, vocab]`: what decode steps predict when every step is prescribed.

    rows: `[batch, steps, channels]`, ordinary codes. The first `prompt` of them go through prefill instead; their
    entries in the result are NaN.
    """
    batch, steps = rows.shape[:2]
    state = DecodeState(
        model.config, model.ops, Sizes(batch, True, steps + 1, max(map(len, texts)), 64, 64), model.dtype, model.device
    )
    for batch_idx, ids in enumerate(texts):
        state.cross_blocks.grow(batch_idx, len(ids))
        state.grow(batch_idx, steps)
        item = plan(model.config, Request(ids, rows[batch_idx, :prompt], max_new_tokens=steps, seed=0))
        # These are the delayed codes themselves, not frames that are delayed.
        item.delayed_codes[:prompt] = rows[batch_idx, :prompt]
        for _ in prefill(model, state, batch_idx, item):
            pass
        place(state, batch_idx, item)
    state.step.fill_(prompt)
    state.first_step.fill_(prompt)
    state.end_step.fill_(4 * steps + 99)  # beyond reach: no EOS is prescribed
    state.codes = torch.zeros(batch, 4 * steps + 100, rows.shape[2], dtype=torch.int32)
    state.prompt_codes = torch.full_like(rows, FREE, dtype=torch.int32)
    state.prompt_codes[:, : steps - prompt] = rows[:, prompt:]
    logits = torch.full((2 * batch, *rows.shape[1:], model.config.decoder.vocab_size), torch.nan)
    for step in range(prompt, steps):
        model.decode_step(state)
        logits[:, step] = state.logits
    return logits


@st.composite
def configs(draw: st.DrawFn) -> DiaConfig:
    def heads(prefix: str = "") -> dict[str, int]:
        kv_heads = draw(st.integers(1, 3))
        return {
            f"{prefix}num_key_value_heads": kv_heads,
            f"{prefix}num_attention_heads": kv_heads * draw(st.integers(1, 3)),
            f"{prefix}head_dim": 16 * draw(st.integers(1, 3)),
        }

    def sizes() -> dict[str, Any]:
        return {
            "hidden_size": 8 * draw(st.integers(2, 6)),
            "intermediate_size": 8 * draw(st.integers(2, 8)),
            "num_hidden_layers": draw(st.integers(1, 3)),
            "norm_eps": draw(st.sampled_from((1e-5, 1e-2))),
            "rope_theta": draw(st.sampled_from((1e4, 50.0))),
        } | heads()

    channels = draw(st.integers(1, 9))
    decoder = sizes() | heads("cross_") | {"num_channels": channels}
    if draw(st.booleans()):
        decoder |= {"vocab_size": 36, "eos_token_id": 32, "pad_token_id": 33, "bos_token_id": 34}
    delay = (0, *(draw(st.integers(0, 15)) for _ in range(channels - 1)))
    return tiny_config(sizes(), decoder, delay_pattern=delay)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), lengths, st.integers(1, 24))
def test_logits_of_whole_sequences(config: DiaConfig, lengths: list[int], steps: int) -> None:
    theirs, model = pair(config)
    texts, rows = random_texts(config, lengths), random_grid(config, len(lengths), steps)
    cond, uncond = model.forward_logits(texts, rows)
    assert uncond is not None
    assert_close(cond, their_logits(theirs, texts, rows))
    assert_close(uncond, their_logits(theirs, texts, rows, conditional=False))


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), lengths, st.integers(1, 40), st.data())
def test_logits_step_by_step(config: DiaConfig, lengths: list[int], steps: int, data: st.DataObject) -> None:
    theirs, model = pair(config)
    texts = random_texts(config, lengths)
    rows = torch.stack(random_prompts(config, [steps] * len(lengths)))
    prompt = data.draw(st.integers(0, steps - 1))
    cond, uncond = decoded_logits(model, texts, rows, prompt).chunk(2)
    assert_close(cond[:, prompt:], their_logits(theirs, texts, rows)[:, prompt:])
    assert_close(uncond[:, prompt:], their_logits(theirs, texts, rows, conditional=False)[:, prompt:])


def test_logits_without_guidance() -> None:
    config = tiny_config()
    theirs, model = pair(config)
    texts, rows = random_texts(config, [9, 30]), random_grid(config, 2, 12)
    cond, uncond = model.forward_logits(texts, rows, guidance=False)
    assert uncond is None
    assert_close(cond, their_logits(theirs, texts, rows))


@pytest.mark.production
def test_logits_at_full_width() -> None:
    encoder = tiny_config().encoder
    config = DiaConfig(
        encoder, replace(DiaConfig().decoder, num_hidden_layers=1, cross_hidden_size=encoder.hidden_size)
    )
    theirs, model = pair(config)
    texts, rows = random_texts(config, [11, 37]), torch.stack(random_prompts(config, [6, 6]))
    expected = torch.cat([their_logits(theirs, texts, rows, conditional) for conditional in (True, False)])
    whole = model.forward_logits(texts, rows)
    assert whole[1] is not None
    assert_close(torch.cat((whole[0], whole[1])), expected)
    assert_close(decoded_logits(model, texts, rows, prompt=2)[:, 2:], expected[:, 2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_no_worse_than_theirs(dtype: torch.dtype) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = tiny_config(
        wide | {"num_key_value_heads": 4, "head_dim": 32},
        wide | {"head_dim": 32, "cross_num_attention_heads": 4, "cross_num_key_value_heads": 4, "cross_head_dim": 32},
    )
    theirs, model = pair(config, dtype=dtype)
    texts = random_texts(config, [13, 80])
    rows = torch.stack(random_prompts(config, [20, 20]))
    both = (True, False)
    low = torch.cat([their_logits(theirs, texts, rows, conditional).double() for conditional in both])
    theirs.double()
    exact = torch.cat([their_logits(theirs, texts, rows, conditional) for conditional in both])
    whole = model.forward_logits(texts, rows)
    assert whole[1] is not None
    error = rms(low - exact)
    results = {"sequence": torch.cat((whole[0], whole[1])), "steps": decoded_logits(model, texts, rows)}
    if model.pack().packed:
        whole = model.forward_logits(texts, rows)
        assert whole[1] is not None
        results["packed sequence"] = torch.cat((whole[0], whole[1]))
        results["packed steps"] = decoded_logits(model, texts, rows)
    for name, logits in results.items():
        ratio = rms(logits - exact) / error
        print(f"{dtype} {name}: {ratio:.3f} of transformers' error, {error / rms(exact):.2e} of the logits")
        assert ratio <= 1


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
