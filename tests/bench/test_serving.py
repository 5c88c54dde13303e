"""The benchmark of many streams runs and reports; what it measures depends on the machine."""

from pathlib import Path

import pytest

from bench import serving
from bench.serving import Heard
from bench.tools import results


def test_a_table_of_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serving.json"
    arguments = ["--device", "cpu", "--streams", "1", "3", "--steps", "40", "--json", str(path)]
    assert serving.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| 1 | " in printed and "| 3 | " in printed
    rows = results.flat(results.read(path))
    assert [row["streams"] for row in rows] == [1, 3]
    assert all(0 <= row["wasted_steps"] <= 8 and row["first_median"] <= row["first_worst"] for row in rows)


def test_a_stall_is_what_a_listener_hears() -> None:
    assert Heard([1.0, 1.1, 1.2], [0.1, 0.1, 0.1]).stall == pytest.approx(0.0)
    assert Heard([1.0, 1.3, 1.4], [0.1, 0.1, 0.1]).stall == pytest.approx(0.2)


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert serving.main(["--model", "no/such/folder/here", "--device", "cpu"]) == 2
    assert "no/such/folder/here" in capsys.readouterr().err
