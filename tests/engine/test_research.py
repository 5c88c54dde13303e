"""The examples for research run on the demo voice, and do what they say."""

import math
from functools import lru_cache
from typing import Any

import pytest
import torch

from dia_fast import Dia
from dia_fast.engine import Engine, Request
from dia_fast.text.tokenizer import encode_text
from examples.research import banned_codes, entropy, guidance_first_steps, guidance_schedule, min_p, self_speculation

STEPS = 50
TEXT = encode_text("[S1] Please open the red door.")


@lru_cache
def plain(**more: Any) -> torch.Tensor:
    """The codes of the examples' text without hooks."""
    model = Dia.from_pretrained("demo", codec=None).model
    return Engine(model, max_batch=1).submit(Request(TEXT, None, STEPS, seed=7, **more)).result().frames


def test_min_p() -> None:
    """With p = 0 nothing is out, with p = 1 all but the likeliest are."""
    free, some, one = min_p.main(["--steps", str(STEPS), "--p", "0", "0.2", "1"])
    assert torch.equal(free, plain(top_k=None, top_p=1.0))
    assert not torch.equal(some, free) and not torch.equal(some, one)
    hooks = min_p.min_p(1024)
    assert hooks.in_step is not None
    logits = torch.randn(2, 9, 1028)
    step: Any = type("Step", (), {"cond": logits.clone(), "extras": {"min_p": torch.tensor([0.3, 1.0])}})
    hooks.in_step(step)
    kept = step.cond > -torch.inf
    assert kept[..., 1024:].all() and (kept[1, :, :1024].sum(-1) == 1).all()
    odds = logits[0, :, :1024].softmax(-1)
    assert torch.equal(kept[0, :, :1024], odds >= 0.3 * odds.amax(-1, keepdim=True))


def test_entropy_of_each_channel() -> None:
    """It is that of teacher forcing, for every request, though rows move."""
    means = entropy.main(["--steps", str(STEPS)])
    assert means.shape == (2, 9) and ((means > 0) & (means < math.log(1028))).all()
    dia = Dia.from_pretrained("demo", codec=None)
    for text, found in zip(entropy.TEXTS, means, strict=True):
        request = Request(encode_text(text), None, STEPS, seed=7)
        codes = Engine(dia.model, max_batch=1).submit(request).result().delayed_codes
        logits, _ = dia.forward_logits(text, codes[None], guidance=False)
        logs = logits[0, :-1].log_softmax(-1)  # the last step's are not used
        expected = -(logs.exp() * logs).sum(-1).mean(0)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_banned_codes_are_not_said() -> None:
    free, held = banned_codes.main(["--steps", str(STEPS)])
    assert torch.equal(free, plain())
    assert not (held == free.mode(0).values).any() and (free == free.mode(0).values).any()


def test_guidance_in_the_first_steps(capsys: pytest.CaptureFixture[str]) -> None:
    said = guidance_first_steps.main(["--steps", str(STEPS), "--guided", "30"])
    assert torch.equal(said["all steps"][0].frames, plain())
    for name, (generation, rows) in said.items():
        steps = len(generation.delayed_codes)
        assert rows == 2 * steps - (steps - 30 if name == "30 steps" else 0)
    assert "the codes are the same up to step" in capsys.readouterr().out


def test_a_schedule_of_guidance() -> None:
    own, always, falling = guidance_schedule.main(["--steps", str(STEPS)])
    assert torch.equal(own, always) and torch.equal(own, plain())
    assert not torch.equal(falling, own)


@pytest.mark.parametrize("layers", [[0, 1, 3, 4], [0, 1, 2, 3, 4], [4]])
def test_self_speculation(layers: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """The codes of plain greedy decoding, whatever drafts; all layers draft what they choose themselves."""
    found = self_speculation.main(["--steps", "25", "--layers", *map(str, layers)])
    model = Dia.from_pretrained("demo", codec=None).model
    request = Request(TEXT, None, 25, temperature=0.0, seed=7)
    expected = Engine(model, max_batch=1).submit(request).result().delayed_codes
    assert torch.equal(found.plain, expected) and torch.equal(found.speculated, expected)
    assert found.steps == len(expected) and found.accepted <= found.drafted == 3 * found.passes
    if len(layers) == 5:
        assert found.passes == -(-found.steps // 4)
    assert "the codes are equal: True" in capsys.readouterr().out
