"""The comparison with the original package of the first generation: refusals and counts."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import first_generation
from bench.first_generation import CASES, CONFIG, is_tie, main, parting, probabilities
from dia_kernels import reference


def test_checkouts_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main([str(tmp_path)]) == 2
    (tmp_path / "dia").mkdir()
    (tmp_path / "dia" / "__init__.py").touch()
    (tmp_path / "dia" / "model.py").write_text("class DiaConfig:\n    model_fields = {'decoder_config': 1}\n")
    for name in ("dia", "dia.model"):  # what is imported is forgotten after the test
        monkeypatch.setitem(sys.modules, name, sys)
        del sys.modules[name]
    assert main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "holds dia/model.py" in told and "check 2811af1 out" in told


def test_batches_are_ragged() -> None:
    assert any(not any(case.prompts) for case in CASES) and any(case.eos_gain for case in CASES)
    assert len({case.scale for case in CASES}) >= 3 and all(len(set(case.texts)) > 1 for case in CASES)


def test_the_code_at_which_two_part() -> None:
    """That of the earliest row of generation, not of the earliest frame: channel 0 is 8 rows ahead of channel 1."""
    expected = np.arange(27).reshape(3, 9)
    assert parting(expected, expected) is None and parting(expected, expected[:2]) is None
    found = expected.copy()
    found[0, 8], found[2, 0], found[1, 1] = 100, 101, 102
    assert parting(expected, found) == (2, 2, 0)
    found[2, 0] = expected[2, 0]
    assert parting(expected, found) == (1 + CONFIG.delay_pattern[1], 1, 1)


@pytest.mark.parametrize(("scale", "weight"), [(0.0, 1.0), (3.0, 7.0), (-2.0, 3.0)])
def test_ties_are_as_wide_as_rounding(scale: float, weight: float) -> None:
    for factor, tie in ((1.99, True), (2.01, False)):
        assert is_tie(torch.tensor([1.0, 1.0 + factor * weight / 1024]), scale, 1 / 1024) is tie


@pytest.mark.parametrize("damp", [0.8, 1.0])
def test_probabilities_of_other_rules_are_found(damp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's rules, written by its own op; with another factor on the end of speech they differ."""

    def decoder_step(_: Any, __: Any, scale: float, temperature: float, top_p: float, top_k: int, ___: int) -> None:
        uncond, cond = made.model.decoder.decode_step()[:, 0]
        mixed = cond + scale * (cond - uncond)
        eos = CONFIG.decoder.eos_token_id
        mixed[0, eos] *= damp / 0.8
        one = torch.ones(1)
        weights = reference.sample_weights(
            torch.stack((mixed, mixed)), one, one * temperature, torch.tensor([top_k], dtype=torch.int32), one * top_p,
            eos=eos, first_generation=True,
        )  # fmt: skip
        torch.multinomial((weights[0] / weights[0].sum(-1, keepdim=True)).float(), 1)

    made = SimpleNamespace(model=SimpleNamespace(decoder=SimpleNamespace()), _decoder_step=decoder_step)
    monkeypatch.setattr(first_generation, "pair", lambda *_: (made, None))
    assert (probabilities(None, 40) <= first_generation.ALLOWED) is (damp == 0.8)
