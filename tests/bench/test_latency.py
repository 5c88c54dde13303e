"""The latency benchmark runs and reports; what it measures depends on the machine."""

import pytest

from bench import latency


def test_a_table_of_chunk_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--rounds", "1", "--steps", "40", "--chunks", "0.1", "0.2"]
    assert latency.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "0.28 s of sound in 41 steps" in printed
    assert "| in one call | 41 | " in printed and "| 0.1 s | 35 | " in printed and "| 0.2 s | 41 | " in printed


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(["--model", "no/such/folder/here", "--codec", "nor/this/one"]) == 2
    assert "nor/this/one" in capsys.readouterr().err
