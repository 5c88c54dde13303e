"""Simulate many replicas: GPUs for so many listeners, time to the first byte, share of the batches in use.

    python -m bench.fleet [--listeners 100 10000 1000000] [--times FILE] [--first 1.0] [--json FILE]
    python -m bench.fleet --measure [--replicas 1 2]

A listener hears one text at the speed of speech; the next one begins when a text ends, so listeners / seconds of a text
is the rate of requests. A replica runs its sequences in one batch: a step takes as long as the table of `--times` says
for so many, a new sequence stops the others for its prefill, and more than `batch` wait, first come, first served. Of
two replicas drawn at random the one with fewer requests gets each request, as Ray Serve does it. Requests come
independently (poisson), or also in bursts that all replicas feel at once (bursty).

The GPUs are the fewest with which 99 % of the first bytes come within `--first` seconds and 99 % of the speech is made
no slower than it is heard. A fleet of more than `--most` replicas is simulated as that many with the same load each.

`--measure` checks the simulation: the demo voice is served on this machine by each number of replicas, the table of
times is measured with all at once, before and after requests that come at random; what their clients measured stands
beside what the simulation makes of the same requests.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.serving_http import SPEECH, TEXTS, Server, serving
from bench.tools.http_client import Exchange, call
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError, InputError

Floats = NDArray[np.float64]
WARM = 0.2  # of the time, which does not count
LATE = 0.01  # of the speech that may be made slower than it is heard
CLOSE = 0.01  # the number of GPUs is known to this share


@dataclass(frozen=True)
class Times:
    """Service times of one replica, in seconds.

    Attributes:
        steps: Pairs of a number of sequences and the time of a step with so many; interpolated in between.
        prefill: Of one sequence, during which no step is made.
        codec: From the last step that the first byte needs to that byte.
        batch: Most sequences at once.
        first_steps: Steps that the first byte needs.
        rate: Steps per second of sound.
        extra_steps: Of a speech beyond those of its sound.
    """

    steps: tuple[tuple[float, float], ...]
    prefill: float
    codec: float
    batch: int
    first_steps: float
    rate: float
    extra_steps: float

    def __post_init__(self) -> None:
        counts = [count for count, _ in self.steps]
        if not counts or counts != sorted(set(counts)) or counts[0] <= 0 or self.batch < 1 or not self.rate > 0:
            raise InputError(
                "times: steps must be pairs of rising numbers of sequences, batch at least 1, rate above 0"
            )
        if self.batch != int(self.batch) or counts[-1] < self.batch:
            raise InputError(f"times: batch must be a whole number, and steps must reach it, not {self.batch:g}")
        values = [value for _, value in self.steps] + [self.prefill, self.codec, self.first_steps, self.extra_steps]
        if not all(0 <= value < math.inf for value in values) or any(value == 0 for _, value in self.steps):
            raise InputError("times: every time must be a positive number of seconds")

    def table(self) -> list[float]:
        """Time of a step by the number of sequences, from 0 to `batch`."""
        counts, values = zip(*self.steps, strict=True)
        return [float(np.interp(count, counts, values)) for count in range(self.batch + 1)]

    def load(self, requests: float, seconds: float) -> float:
        """Replicas that requests per second, each of so many seconds of sound, keep busy with full batches."""
        steps = self.rate * seconds + self.extra_steps
        return requests * (steps * self.table()[self.batch] / self.batch + self.prefill)


# Steps: an H200, bf16, under guidance, docs/benchmarks.md: the first is estimated, the others are of an earlier table
# of configs. Prefill and codec: assumed.
H200 = Times(((1, 1.00e-3), (8, 1.82e-3), (32, 5.07e-3)), 0.01, 0.01, 32, 9 + 14 + 15, 86.13, 15)


def read_times(path: Path) -> Times:
    """Read the fields of `Times` from JSON.

    Raises:
        InputError: If it has none, others, or wrong ones.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Times(**{**found, "steps": tuple((float(count), float(value)) for count, value in found["steps"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        names = ", ".join(Times.__dataclass_fields__)
        raise InputError(f"{path}: must be a JSON object of {names} ({error})") from error


@dataclass(frozen=True)
class Outcome:
    """Results of a simulation, by request, and of the replicas.

    Attributes:
        first: Seconds from arrival to the first byte.
        end: Seconds from arrival to the last one.
        lag: Seconds by which a speech ends later than one that is heard from its first byte on.
        fill: Sequences that ran, as a share of those that could.
        busy: Share of the time in which a replica had anything to do.
    """

    first: Floats
    end: Floats
    lag: Floats
    fill: float
    busy: float


class Replica:
    """One engine. Time goes on for it at `advance`; all its sequences have made the same number of steps in between."""

    def __init__(self, times: Times, arrivals: Floats, steps: Floats, window: tuple[float, float]) -> None:
        self.times, self.arrivals, self.steps = times, arrivals, steps
        self._step, self._window = times.table(), window
        self._made, self._now, self._ready = 0.0, 0.0, 0.0  # steps so far; until when; when the prefill has ended
        self._ends: list[tuple[float, int]] = []
        self._firsts: list[tuple[float, int]] = []
        self.waiting: deque[int] = deque()
        self.version = 0
        self.row_seconds = self.busy_seconds = 0.0

    def __len__(self) -> int:
        return len(self._ends) + len(self.waiting)

    def advance(self, now: float, heard: Callable[[int, float], None]) -> None:
        """Make the steps until a moment; `heard` is told the time of each first byte before the codec."""
        running = len(self._ends)
        inside = min(now, self._window[1]) - max(self._now, self._window[0])
        if inside > 0 and running:
            self.row_seconds += inside * running
            self.busy_seconds += inside
        start = max(self._now, self._ready)
        if running and now > start:
            step = self._step[running]
            made = self._made + (now - start) / step
            while self._firsts and self._firsts[0][0] <= made + 1e-6:
                at, index = heappop(self._firsts)
                heard(index, start + max(at - self._made, 0.0) * step)
            self._made = made
        self._now = now

    def ended(self) -> list[int]:
        """Take out the requests whose steps are made."""
        found = []
        while self._ends and self._ends[0][0] <= self._made + 1e-6:
            found.append(heappop(self._ends)[1])
        return found

    def admit(self) -> None:
        """Begin what waits, as far as there is room."""
        while self.waiting and len(self._ends) < self.times.batch:
            index = self.waiting.popleft()
            self._ready = max(self._ready, self._now) + self.times.prefill
            heappush(self._ends, (self._made + self.steps[index], index))
            heappush(self._firsts, (self._made + min(self.times.first_steps, self.steps[index]), index))

    def next_end(self) -> float:
        """Return the moment at which the next request ends if no other one begins."""
        left = max(self._ends[0][0] - self._made, 0.0)
        return max(self._now, self._ready) + left * self._step[len(self._ends)]


def simulate(times: Times, replicas: int, arrivals: Floats, seconds: Floats, seed: int = 0) -> Outcome:
    """Run requests through replicas to their end.

    Args:
        times: Of each replica.
        replicas: How many.
        arrivals: When each request comes, rising.
        seconds: How long the sound of each is.
        seed: Of the draw of replicas.
    """
    if not len(arrivals):
        raise InputError("no request comes within the simulated time: make it longer")
    steps = times.rate * seconds + times.extra_steps
    horizon = float(arrivals[-1])
    window = (WARM * horizon, horizon)
    fleet = [Replica(times, arrivals, steps, window) for _ in range(replicas)]
    first, end = np.full(len(arrivals), np.nan), np.full(len(arrivals), np.nan)
    events: list[tuple[float, int, int]] = []
    dice = random.Random(seed)

    def heard(index: int, moment: float) -> None:
        first[index] = moment

    def go_on(number: int, now: float, index: int | None) -> None:
        replica = fleet[number]
        replica.advance(now, heard)
        for ended in replica.ended():
            end[ended] = now
        if index is not None:
            replica.waiting.append(index)
        replica.admit()
        replica.version += 1
        if len(replica):
            heappush(events, (replica.next_end(), number, replica.version))

    def work_off(until: float) -> None:
        while events and events[0][0] <= until:
            now, number, version = heappop(events)
            if fleet[number].version == version:
                go_on(number, now, None)

    for index, now in enumerate(arrivals.tolist()):
        work_off(now)
        one = int(dice.random() * replicas)
        pair = one, (one + 1 + int(dice.random() * (replicas - 1))) % replicas
        go_on(min(pair, key=lambda number: len(fleet[number])), now, index)
    work_off(math.inf)
    counted = arrivals >= window[0]
    sound = (steps - np.minimum(times.first_steps, steps)) / times.rate
    span = replicas * (window[1] - window[0])
    return Outcome(
        (first - arrivals + times.codec)[counted],
        (end - arrivals + times.codec)[counted],
        (end - first - sound)[counted],
        sum(replica.row_seconds for replica in fleet) / span / times.batch,
        sum(replica.busy_seconds for replica in fleet) / span,
    )


def poisson(rate: float, horizon: float, dice: np.random.Generator) -> Floats:
    """Requests that come independently of each other."""
    return np.sort(dice.uniform(0, horizon, dice.poisson(rate * horizon)))


@dataclass(frozen=True)
class Bursts:
    """Times of `ratio` times as many requests as otherwise: a `share` of all time, `seconds` each on average."""

    ratio: float = 2.0
    share: float = 0.1
    seconds: float = 20.0

    def arrivals(self, rate: float, horizon: float, dice: np.random.Generator) -> Floats:
        """Requests of the given mean rate."""
        quiet = rate / (1 - self.share + self.share * self.ratio)
        found, now = [], 0.0
        burst = bool(dice.random() < self.share)
        while now < horizon:
            mean = self.seconds if burst else self.seconds * (1 - self.share) / self.share
            span = min(dice.exponential(mean), horizon - now)
            found.append(now + poisson(quiet * (self.ratio if burst else 1), span, dice))
            now, burst = now + span, not burst
        return np.concatenate(found)


def texts(count: int, seconds: float, variation: float, dice: np.random.Generator) -> Floats:
    """Lengths of so many texts: gamma, of a standard deviation of `variation` times the mean."""
    if variation == 0:
        return np.full(count, seconds)
    return dice.gamma(variation**-2, seconds * variation**2, count)


@dataclass(frozen=True)
class Demand:
    """Requests of a number of listeners."""

    listeners: float
    kind: str
    seconds: float
    variation: float
    horizon: float

    def draw(self, share: float, dice: np.random.Generator) -> tuple[Floats, Floats]:
        """Draw arrivals and lengths of a share of the listeners."""
        rate = share * self.listeners / self.seconds
        come = poisson if self.kind == "poisson" else Bursts().arrivals
        arrivals = come(rate, self.horizon, dice)
        return arrivals, texts(len(arrivals), self.seconds, self.variation, dice)


def with_replicas(times: Times, demand: Demand, replicas: int, most: int, seed: int) -> Outcome:
    """Simulate a fleet, or a part of it with the same load for each."""
    part = min(replicas, most)
    dice = np.random.default_rng(seed)
    return simulate(times, part, *demand.draw(part / replicas, dice), seed)


def enough(outcome: Outcome, first: float) -> bool:
    """True if 99 % of first bytes and of speech come in time."""
    return bool(np.quantile(outcome.first, 0.99) <= first and np.mean(outcome.lag > 1e-3) <= LATE)


def size(times: Times, demand: Demand, first: float, most: int, seed: int) -> tuple[int, Outcome]:
    """Find the fewest replicas that are enough, and their results.

    Raises:
        InputError: If one listener alone is not served in time, so that no number is enough.
    """
    alone = simulate(times, 1, np.array([0.0, 1e6]), np.full(2, demand.seconds))
    if not enough(alone, first):
        raise InputError(
            f"no number of replicas is enough: alone, a request has its first byte after {alone.first[-1]:.3f} s and "
            f"its last one {alone.lag[-1]:.3f} s too late"
        )
    low = max(0, math.floor(times.load(demand.listeners / demand.seconds, demand.seconds)) - 1)
    high = low + 1
    while not enough(found := with_replicas(times, demand, high, most, seed), first):
        low, high = high, math.ceil(high * 1.25)
    while high - low > max(1, CLOSE * low):
        middle = (low + high) // 2
        outcome = with_replicas(times, demand, middle, most, seed)
        if enough(outcome, first):
            high, found = middle, outcome
        else:
            low = middle
    return high, found


def report(options: argparse.Namespace, results: Results) -> None:
    """Print and note the sizes."""
    times = read_times(options.times) if options.times else H200
    shown = ", ".join(f"{count:g}: {1e3 * value:.2f}" for count, value in times.steps)
    print(f"ms of a step by sequences: {shown}; prefill {1e3 * times.prefill:g} ms, codec {1e3 * times.codec:g} ms")
    print(f"texts of {options.seconds:g} s; 99 % of first bytes within {options.first:g} s\n")
    print("| listeners | requests | GPUs | listeners a GPU | batch in use | first byte p50 | p99 |")
    print("|---:|---|---:|---:|---:|---:|---:|", flush=True)
    for listeners in options.listeners:
        for kind in ("poisson", "bursty"):
            demand = Demand(listeners, kind, options.seconds, options.variation, options.horizon)
            count, outcome = size(times, demand, options.first, options.most, options.seed)
            p50, p99 = np.quantile(outcome.first, [0.5, 0.99])
            values = {
                "replicas": count, "fill": outcome.fill, "busy": outcome.busy, "first_p50": p50, "first_p99": p99,
                "late_share": float(np.mean(outcome.lag > 1e-3)),
            }  # fmt: skip
            results.add(
                {"listeners": listeners, "requests": kind}, {name: float(value) for name, value in values.items()}
            )
            print(
                f"| {listeners:,} | {kind} | {count:,} | {listeners / count:.1f} | {outcome.fill:.0%} | "
                f"{1e3 * p50:.0f} ms | {1e3 * p99:.0f} ms |",
                flush=True,
            )


# Against replicas on this machine


@dataclass(frozen=True)
class Heard:
    """One request as its client saw it, in seconds from its beginning."""

    first: float
    end: float
    sound: float


async def listen(server: Server, fields: dict[str, Any]) -> Heard:
    """Make a request to its end."""
    async with Exchange(server.port) as exchange:
        start = time.perf_counter()
        await exchange.request("POST", SPEECH, fields)
        if await exchange.answer() != 200:
            raise RuntimeError(f"status {exchange.status}")
        first, size_ = 0.0, 0
        async for piece in exchange.pieces():
            first = first or time.perf_counter() - start
            size_ += len(piece)
        return Heard(first, time.perf_counter() - start, size_ / 2 / 24_000)


def jobs() -> list[dict[str, Any]]:
    """Requests of different lengths, the same at each call."""
    return [
        {"input": text, "seed": seed, "response_format": "pcm", "first_chunk_seconds": 0.1}
        for seed, text in enumerate([*TEXTS, " ".join(TEXTS[:3])], 3)
    ]


async def calibrate(server: Server, replicas: int, base: Times, rounds: int) -> Times:
    """Measure the table of times: so many requests begin at once, again and again."""
    counts = sorted({1, 2, max(1, base.batch // 2), base.batch})
    job = jobs()[-1]
    await asyncio.gather(*(listen(server, job) for _ in range(2 * replicas)))  # what is made at first use
    rows, left = [], []
    for count in counts:
        steps, firsts = [], []
        for _ in range(rounds):
            for heard in await asyncio.gather(*(listen(server, job) for _ in range(count * replicas))):
                made = base.rate * heard.sound + base.extra_steps - base.first_steps
                steps.append((heard.end - heard.first) / made)
                firsts.append(heard.first)
        rows.append((float(count), statistics.median(steps)))
        left.append(statistics.median(firsts) - base.first_steps * rows[-1][1])
    slope, rest = np.polyfit(counts, left, 1)
    prefill = min(max(float(slope), 0.0), max(left[0], 0.0))
    return replace(base, steps=tuple(rows), prefill=prefill, codec=max(left[0] - prefill, 0.0))


def between(before: Times, after: Times) -> Times:
    """The mean of two tables: the machine may have had more to do at the end than at the beginning."""
    steps = tuple(
        (count, (one + other) / 2) for (count, one), (_, other) in zip(before.steps, after.steps, strict=True)
    )
    prefill, codec = (before.prefill + after.prefill) / 2, (before.codec + after.codec) / 2
    return replace(before, steps=steps, prefill=prefill, codec=codec)


async def against(server: Server, replicas: int, options: argparse.Namespace, base: Times) -> dict[str, Any]:
    """Measure, then let requests come at random; return measured and simulated figures."""
    while (await call(server.port, "GET", "/ready")).status != 200:
        await asyncio.sleep(0.1)
    times = await calibrate(server, replicas, base, options.rounds)
    lengths = {index: (await listen(server, job)).sound for index, job in enumerate(jobs())}
    mean = statistics.mean(lengths.values())
    rate = options.load * replicas / times.load(1.0, mean)
    dice = np.random.default_rng(options.seed)
    arrivals = np.cumsum(dice.exponential(1 / rate, options.requests))
    chosen = dice.integers(0, len(lengths), options.requests).tolist()
    rows, start = [], time.perf_counter()

    async def come(moment: float, index: int) -> Heard:
        await asyncio.sleep(max(0.0, moment - (time.perf_counter() - start)))
        return await listen(server, jobs()[index])

    async def watch() -> None:
        while True:
            rows.append((time.perf_counter() - start, await server.metric("running")))
            await asyncio.sleep(0.2)

    watching = asyncio.ensure_future(watch())
    heard = await asyncio.gather(*(come(*pair) for pair in zip(arrivals.tolist(), chosen, strict=True)))
    watching.cancel()
    times = between(times, await calibrate(server, replicas, base, options.rounds))
    window = (WARM * arrivals[-1], arrivals[-1])
    measured = np.array([one.first for one in heard])[arrivals >= window[0]]
    made = simulate(times, replicas, arrivals, np.array([lengths[index] for index in chosen]), options.seed)
    inside = [running for moment, running in rows if window[0] <= moment <= window[1]]
    figures = {"load": options.load, "requests_per_second": rate, "prefill_ms": 1e3 * times.prefill}
    figures |= {"codec_ms": 1e3 * times.codec} | {f"step_ms_{int(count)}": 1e3 * value for count, value in times.steps}
    for share in (50, 99):
        figures[f"first_p{share}"] = float(np.quantile(measured, share / 100))
        figures[f"simulated_p{share}"] = float(np.quantile(made.first, share / 100))
    filled = statistics.mean(inside) / replicas / times.batch if inside else math.nan
    return figures | {"fill": filled, "simulated_fill": made.fill}


def compare(options: argparse.Namespace, results: Results) -> None:
    """Print and note measured beside simulated figures of each number of replicas."""
    from dia_fast import Dia

    dia = Dia.from_pretrained("demo")
    delay, rate = max(dia.config.delay_pattern), dia.codec.frames_per_second
    first = round(0.1 * rate) + dia.codec.decode_context_frames + delay
    base = Times(((options.batch, 1e-3),), 0, 0, options.batch, first, rate, delay)  # times are measured later
    print("| replicas | load | first byte p50 | simulated | p99 | simulated | batch in use | simulated |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for replicas in options.replicas:
        ray = ["--ray", "local", "--replicas", str(replicas)] if replicas > 1 else []
        serve = ["--max-batch", str(options.batch), "--max-queue", "1000", "--threads", "1", *ray]
        with serving(serve) as server:
            found = asyncio.run(against(server, replicas, options, base))
            server.process.terminate()
            server.process.wait(60)
        results.add({"replicas": replicas}, found)
        print(
            f"| {replicas} | {options.load:.0%} | {found['first_p50']:.3f} s | {found['simulated_p50']:.3f} s | "
            f"{found['first_p99']:.3f} s | {found['simulated_p99']:.3f} s | {found['fill']:.0%} | "
            f"{found['simulated_fill']:.0%} |",
            flush=True,
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="fleet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--listeners", type=int, nargs="+", default=[100, 10_000, 1_000_000])
    parser.add_argument("--times", type=Path, metavar="FILE", help=f"JSON of {', '.join(asdict(H200))} (an H200)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of sound in a text, on average (%(default)s)")
    parser.add_argument("--variation", type=float, default=0.5, help="standard deviation / mean of it (%(default)s)")
    parser.add_argument("--first", type=float, default=1.0, help="most seconds to a first byte (%(default)s)")
    parser.add_argument("--horizon", type=float, default=900.0, help="seconds to simulate (%(default)s)")
    parser.add_argument("--most", type=int, default=48, help="replicas to simulate (%(default)s)")
    parser.add_argument("--measure", action="store_true", help="compare with replicas on this machine")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2], help="with --measure (1 2; Ray from 2 on)")
    parser.add_argument("--batch", type=int, default=4, help="with --measure: --max-batch (%(default)s)")
    parser.add_argument("--load", type=float, default=0.6, help="with --measure: of what full batches do (%(default)s)")
    parser.add_argument("--requests", type=int, default=100, help="with --measure (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="with --measure: for the table of times (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    positive = (*options.listeners, *options.replicas, options.seconds, options.first, options.horizon, options.most)
    if (
        min(*positive, options.batch, options.load, options.rounds) <= 0
        or options.variation < 0
        or options.requests < 9
    ):
        parser.error("numbers must be above 0, --variation at least 0, --requests at least 9")
    try:
        results = Results(parser, options, arguments)
        (compare if options.measure else report)(options, results)
    except (RuntimeError, DiaFastError) as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 2
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
