"""Batches: what is in them, what they refuse, condition dropout, and codes that are disturbed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.tools.tiny_models import tiny_config
from dia_fast.errors import InputError
from dia_fast.model.delay import undo_delay
from dia_fast.training import IGNORED, Example, build_batch, disturb_codes, drop_conditions
from dia_fast.training.batch import longest_speech

CONFIG = tiny_config()
DELAY, EOS = CONFIG.delay_pattern, CONFIG.decoder.eos_token_id


def codes(frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, EOS, (frames, len(DELAY)), generator=generator)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=4))
def test_labels_are_the_rows_that_follow(sizes: list[tuple[int, int]]) -> None:
    examples = [Example([1] * text, codes(frames, seed)) for seed, (text, frames) in enumerate(sizes)]
    batch = build_batch(examples, CONFIG)
    longest = max(frames for _, frames in sizes)
    assert batch.delayed_codes.shape == (len(sizes), longest + 1 + max(DELAY), len(DELAY)) == batch.labels.shape
    assert torch.equal(batch.counts(), torch.full((len(DELAY),), sum(frames + 1 for _, frames in sizes)))
    for item, (text, frames) in enumerate(sizes):
        assert batch.text_mask[item].tolist() == [True] * text + [False] * (batch.text.shape[1] - text)
        assert not batch.step_mask[item, : longest - frames].any() and batch.step_mask[item, longest - frames :].all()
        grid = torch.cat((batch.delayed_codes[item, :1], batch.labels[item]))[longest - frames :]
        assert torch.equal(undo_delay(grid, DELAY, EOS), examples[item].codes)
        for channel, late in enumerate(DELAY):
            known = batch.labels[item, :, channel] != IGNORED
            assert known.nonzero().flatten().tolist() == list(range(longest - frames + late, longest + late + 1))
            assert batch.labels[item, longest + late, channel] == EOS


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example([], codes(3)), "the text has 0 bytes; the model reads 1 to 128"),
        (Example([1] * 129, codes(3)), "the text has 129 bytes"),
        (Example([0], codes(3)), "ids outside 1..255"),
        (Example([1], codes(0)), "has 0 frames"),
        (Example([1], codes(longest_speech(CONFIG) + 1)), "has 305 frames; the model can learn from 1 to 304: split"),
        (Example([1], codes(3)[:, :8]), r"shape \[frames, 9\], not torch.int64 \[3, 8\]"),
        (Example([1], codes(3) + 0.5), "must be integers"),
        (Example([1], codes(3) - EOS), "the codes hold -"),
        (Example([1], codes(3) * 0 + EOS), "the codes hold 1024; codes of sound go from 0 to 1023"),
    ],
)
def test_what_cannot_be_learnt_from_is_named(example: Example, message: str) -> None:
    with pytest.raises(InputError, match=f"example 1: .*{message}"):
        build_batch([Example([1], codes(3)), example], CONFIG)


def test_nothing_at_all() -> None:
    with pytest.raises(InputError, match="at least one example"):
        build_batch([], CONFIG)


def test_the_longest_speech_fits() -> None:
    batch = build_batch([Example([1], codes(longest_speech(CONFIG)))], CONFIG)
    assert batch.delayed_codes.shape[1] == CONFIG.decoder.max_position_embeddings


def test_condition_dropout() -> None:
    batch = build_batch([Example([5] * (n % 100 + 1), codes(2)) for n in range(200)], CONFIG)
    dropped = drop_conditions(batch, 0.25, torch.Generator().manual_seed(0))
    gone = (dropped.text == 0).all(1)
    assert 30 <= int(gone.sum()) <= 70  # 50 +- 6; five sigma are 31
    assert torch.equal(dropped.text[~gone], batch.text[~gone])
    assert torch.equal(dropped.text_mask, batch.text_mask), "the zeros are read, not masked"
    again = drop_conditions(batch, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(again.text, dropped.text)
    for probability, none in ((0.0, True), (1.0, False)):
        text = drop_conditions(batch, probability, torch.Generator().manual_seed(0)).text
        assert torch.equal(text, batch.text if none else torch.zeros_like(text))


def test_disturbed_codes() -> None:
    batch = build_batch([Example([1], codes(n % 40 + 1, n)) for n in range(100)], CONFIG)
    disturbed = disturb_codes(batch, 0.25, CONFIG, torch.Generator().manual_seed(0))
    known = batch.delayed_codes < EOS
    changed = disturbed.delayed_codes != batch.delayed_codes
    assert not changed[~known].any(), "only codes of sound are replaced"
    count, expected = int(changed.sum()), 0.25 * (1 - 1 / EOS) * int(known.sum())
    assert abs(count - expected) < 5 * (0.25 * 0.75 * int(known.sum())) ** 0.5
    assert (changed.sum((0, 1)) > 0).all() and disturbed.delayed_codes[changed].max() < EOS
    assert len(disturbed.delayed_codes[changed].unique()) > EOS / 2, "all codes come"
    for name in ("text", "text_mask", "step_mask", "labels"):
        assert torch.equal(getattr(disturbed, name), getattr(batch, name))
    again = disturb_codes(batch, 0.25, CONFIG, torch.Generator().manual_seed(0))
    assert torch.equal(again.delayed_codes, disturbed.delayed_codes)
    assert disturb_codes(batch, 0.0, CONFIG, torch.Generator()) is batch
