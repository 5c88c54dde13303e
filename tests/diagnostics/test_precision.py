"""The doctor's verdict on weights in 8 bits."""

import math

import pytest
import torch

from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.cli import main
from dia_fast.diagnostics.precision import TOP, compare, layer_verdicts, signal_to_noise


def test_equal_distributions_have_no_error() -> None:
    logits = torch.randn(7, 100).log_softmax(-1)
    errors = compare(logits, logits)
    assert (errors.kl, errors.argmax, errors.overlap, errors.compared) == (0, 1, 1, 7)
    assert errors.verdict.healthy


def test_errors_are_counted() -> None:
    """Two ids with 3 : 1 against 1 : 1, and one of the likeliest `TOP` exchanged for another."""
    stored = torch.tensor([[0.75, 0.25]]).log()
    errors = compare(stored, torch.tensor([[0.5, 0.5]]).log())
    assert math.isclose(errors.kl, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel_tol=1e-6)
    assert not errors.verdict.healthy
    first = torch.arange(100, 0, -1, dtype=torch.float32)[None].log_softmax(-1)
    second = first.clone()
    second[0, [TOP - 1, TOP + 5]] = first[0, [TOP + 5, TOP - 1]]
    second[0, [0, 1]] = first[0, [1, 0]]
    errors = compare(first, second)
    assert math.isclose(errors.overlap, 1 - 1 / TOP) and errors.argmax == 0


def test_signal_to_noise_in_decibels() -> None:
    assert signal_to_noise(torch.tensor([[127.0, 1.0, -3.0]])) == math.inf
    # An error of 0.25 beside 127^2 + 2 * 0.75^2.
    weight = torch.tensor([[127.0, 0.75, 0.75]])
    assert math.isclose(signal_to_noise(weight), 10 * math.log10((127**2 + 2 * 0.75**2) / (2 * 0.25**2)), rel_tol=1e-6)


def test_the_demo_voice_keeps_its_logits(capsys: pytest.CaptureFixture[str]) -> None:
    layers = layer_verdicts(open_checkpoint("demo"), "int8")
    assert {"encoder.layers.0", "decoder.layers.0", "decoder"} <= {verdict.op for verdict in layers}
    assert main(["doctor", "--model", "demo", "--device", "cpu", "--weights", "int8"]) == 0
    shown = capsys.readouterr().out
    assert "SQNR at least" in shown and "mean KL" in shown
    assert main(["doctor", "--model", "demo", "--device", "cpu", "--weights", "int4"]) == 2
    assert main(["doctor", "--device", "cpu", "--weights", "int8"]) == 2
