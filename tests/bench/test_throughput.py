"""The benchmarks of many requests run and report; their arithmetic is checked, their times are the machine's."""

import csv
from pathlib import Path

import pytest

from bench import ragged, throughput
from bench.measure import Seconds
from bench.tools.tiny_models import make_transformers_checkpoint, tiny_config
from dia_fast.engine import Request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_transformers_checkpoint(tmp_path_factory.mktemp("bench") / "model", tiny_config()))


def test_scaling_is_a_table_and_a_plot(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", folder, "--dtype", "float32", "--text", "9", "--device", "cpu", "--steps", "2"]
    arguments += ["--requests", "1", "3", "--rounds", "1", "--against", "transformers", "--against-most", "1"]
    assert throughput.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "frames_per_second" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "throughput.csv").open()))
    assert [row["requests"] for row in rows] == ["1", "3"]
    for row in rows:
        rate = float(row["requests"]) / float(row["step_ms"]) * 1e3
        assert float(row["frames_per_second"]) == pytest.approx(rate)
    assert rows[0]["ratio"] and not rows[1]["ratio"]
    assert (tmp_path / "throughput-dark.png").read_bytes().startswith(b"\x89PNG")


def test_more_requests_than_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--model", "none", "--requests", "33"])
    assert "from 1 to 32 fit in a batch, got [33]" in capsys.readouterr().err


def test_ragged_requests_all_end(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", folder, "--dtype", "float32", "--text", "9", "--device", "cpu", "--requests", "5"]
    arguments += ["--steps", "17", "30", "--gap", "0.05", "--against", "transformers", "--static", "2"]
    assert ragged.main([*arguments, "--samples", "2", "--sample-steps", "2"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "4 steps over the whole run" in printed and "static batches of 2, extrapolated" in printed
    assert "dia-fast, one engine, measured: done after" in printed


def test_static_batches_wait_for_their_last_request_and_their_longest() -> None:
    arrivals = [
        ragged.Arrival(moment, Request([1], max_new_tokens=steps))
        for moment, steps in ((0.0, 20), (4.0, 50), (5.0, 30), (100.0, 10))
    ]
    outcome = ragged.static(arrivals, 2, Seconds(0.5, 0.75))
    assert outcome.end == 100 + 30 * 0.5
    assert outcome.busy == Seconds(80 * 0.5, 80 * 0.75)
    assert outcome.mean_wait == pytest.approx((29 + 25 + 110 + 15) / 4)
