"""The simulation of many replicas, against the theory of queues and arithmetic by hand."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import fleet
from bench.fleet import H200, Bursts, Demand, InputError, Times, enough, poisson, read_times, simulate, size, texts

# A step of 1 s, sequences that do not slow each other down, and a first byte that comes when a sequence begins.
PLAIN = Times(((1, 1.0), (64, 1.0)), prefill=0, codec=0, batch=1, first_steps=0, rate=1, extra_steps=0)


def waits(times: Times, load: float, exponential: bool, seeds: int = 12) -> tuple[float, float]:
    """The mean wait of requests of one second on average, and its standard error over seeds."""
    means = []
    for seed in range(seeds):
        dice = np.random.default_rng(seed)
        arrivals = poisson(load * times.batch, 8000, dice)
        seconds = dice.exponential(1.0, len(arrivals)) if exponential else np.ones(len(arrivals))
        means.append(float(simulate(times, 1, arrivals, seconds).first.mean()))
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(seeds))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_at_a_time_is_the_queue_m_d_1(load: float) -> None:
    mean, error = waits(PLAIN, load, exponential=False)
    assert abs(mean - load / (2 * (1 - load))) < 4 * error


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_is_the_queue_m_m_c(count: int) -> None:
    load = 0.7
    offered = load * count
    last = offered**count / math.factorial(count) / (1 - load)
    waiting = last / (sum(offered**k / math.factorial(k) for k in range(count)) + last)  # Erlang's C
    mean, error = waits(replace(PLAIN, batch=count), load, exponential=True)
    assert abs(mean - waiting / (count * (1 - load))) < 4 * error


def test_requests_by_hand() -> None:
    times = Times(((1, 1.0), (2, 1.5)), prefill=0.5, codec=0.25, batch=2, first_steps=2, rate=1, extra_steps=1)
    found = simulate(times, 1, np.array([0.0, 1.5, 1.6]), np.full(3, 3.0))
    # The first has made 1 step when the second stops it until 2.0; both make steps of 1.5 s, and the first ends at
    # 6.5. The third stops the second, which has made 3, until 7.0; that ends at 8.5, the other has then made 1.
    counted = [(3.5, 6.5), (5.0, 8.5), (9.5, 11.5)]
    window = 0.2 * 1.6
    expected = [(a - b, c - b) for (a, c), b in zip(counted, [0.0, 1.5, 1.6], strict=True) if b >= window]
    assert found.first == pytest.approx([first + 0.25 for first, _ in expected])
    assert found.end == pytest.approx([end + 0.25 for _, end in expected])
    assert found.lag == pytest.approx([8.5 - 5.0 - 2, 11.5 - 9.5 - 2])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 0.05), st.floats(0.2, 1.5))
def test_every_request_ends_and_all_steps_are_made(
    replicas: int, batch: int, seed: int, prefill: float, load: float
) -> None:
    times = Times(((1, 0.01), (5, 0.02)), prefill, 0.01, batch, 30, 80.0, 15)
    dice = np.random.default_rng(seed)
    arrivals = np.cumsum(dice.exponential(1 / (load * replicas / times.load(1.0, 2.0)), 200))
    seconds = texts(200, 2.0, 0.5, dice)
    found = simulate(times, replicas, arrivals, seconds, seed)
    counted = arrivals >= 0.2 * arrivals[-1]
    assert np.isfinite(found.first).all() and len(found.first) == counted.sum()
    steps = 80.0 * seconds[counted] + 15
    assert (found.first >= np.minimum(steps, 30) * 0.01 + prefill + 0.01 - 1e-9).all()
    assert (found.end >= steps * 0.01 + prefill + 0.01 - 1e-6).all() and (found.end >= found.first - 1e-6).all()
    assert 0 < found.fill <= found.busy + 1e-9 <= 1 + 2e-9


def test_all_at_once_share_a_batch() -> None:
    times = replace(H200, prefill=0.0)
    found = simulate(times, 1, np.full(32, 1.0), np.full(32, 10.0))
    assert found.end == pytest.approx(np.full(32, (861.3 + 15) * 5.07e-3 + 0.01))


def test_of_two_replicas_the_emptier_one_is_asked() -> None:
    found = simulate(replace(H200, prefill=0.0), 2, np.full(64, 1.0), np.full(64, 10.0))
    assert found.end == pytest.approx(np.full(64, (861.3 + 15) * 5.07e-3 + 0.01))


def test_more_replicas_or_less_load_are_never_worse() -> None:
    def p99(replicas: int, listeners: float) -> float:
        demand = Demand(listeners, "poisson", 10.0, 0.5, 300.0)
        return float(np.quantile(fleet.with_replicas(H200, demand, replicas, 99, 0).first, 0.99))

    by_count = [p99(count, 300) for count in (4, 5, 7, 10)]
    by_load = [p99(5, listeners) for listeners in (150, 250, 350, 450)]
    assert by_count == sorted(by_count, reverse=True) and by_load == sorted(by_load)


def test_a_part_of_a_fleet_stands_for_it() -> None:
    def p99(most: int) -> list[float]:
        demand = Demand(96 * 64, "poisson", 10.0, 0.5, 60.0)
        return [float(np.quantile(fleet.with_replicas(H200, demand, 96, most, seed).first, 0.99)) for seed in range(4)]

    whole, part = p99(96), p99(24)
    error = math.hypot(np.std(whole, ddof=1), np.std(part, ddof=1))
    assert abs(np.mean(whole) - np.mean(part)) < 4 * error


@pytest.mark.parametrize("kind", ["poisson", "bursty"])
def test_the_fewest_gpus_are_found(kind: str) -> None:
    demand = Demand(400, kind, 10.0, 0.5, 200.0)
    count, outcome = size(H200, demand, 1.0, 48, 0)
    assert enough(outcome, 1.0)
    assert not enough(fleet.with_replicas(H200, demand, count - 1, 48, 0), 1.0)
    assert count >= H200.load(40, 10)


def test_bursts_have_the_mean_rate_and_more_spread() -> None:
    dice = np.random.default_rng(0)
    found = Bursts().arrivals(20.0, 20_000, dice)
    assert (np.diff(found) >= 0).all() and len(found) / 20_000 == pytest.approx(20, rel=0.05)

    def spread(arrivals: np.ndarray) -> float:
        counts = np.histogram(arrivals, np.arange(0, 20_000, 10.0))[0]
        return float(counts.var() / counts.mean())

    assert spread(found) > 3 * spread(poisson(20.0, 20_000, dice))


def test_what_no_number_serves_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(asdict(replace(H200, steps=((1, 0.02), (32, 0.02))))))
    assert fleet.main(["--times", str(slow), "--listeners", "5"]) == 2
    assert "no number of replicas is enough" in capsys.readouterr().err


def test_a_demand_without_a_request_is_told() -> None:
    with pytest.raises(InputError, match="no request comes"):
        simulate(PLAIN, 1, np.zeros(0), np.zeros(0))


def test_steps_reach_the_batch() -> None:
    with pytest.raises(InputError, match="steps must reach it, not 64"):
        replace(H200, batch=64)


def test_times_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps(asdict(H200)))
    assert read_times(path) == H200
    for wrong in ({"steps": []}, {"steps": [[2, 1.0], [1, 1.0]]}, {"batch": 0}, {"prefill": -1}, {"other": 1}):
        path.write_text(json.dumps(asdict(H200) | wrong))
        with pytest.raises(InputError, match=r"times"):
            read_times(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="must be a JSON object"):
        read_times(path)


@pytest.mark.parametrize("batch", ["1", "4"])
def test_measuring_comes_as_far_as_the_servers(batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def serving(*given: object) -> None:
        raise ConnectionError("here a server would start")

    monkeypatch.setattr(fleet, "serving", serving)
    with pytest.raises(ConnectionError, match="here a server"):
        fleet.main(["--measure", "--replicas", "1", "--batch", batch])
