"""Requests of different lengths that arrive one after another: continuous batching against static batches.

    python -m bench.ragged --model FOLDER [--against transformers] [--requests 24] [--steps 50 400] [--gap 5]

Lengths are drawn between the two numbers of `--steps`, gaps between arrivals from an exponential distribution of mean
`--gap` seconds. Ours all run, in one engine, and its steps are what the clock counts. transformers takes static batches
of `--static` in the order of arrival: a batch starts when its last request is there and the batch before has ended, and
ends with its longest request. Its steps are NOT all run, a batch of eight takes seconds per step on a CPU:
`--samples` short runs of a full batch, spread over our run so that both see the same machine, tell what a step takes,
and the end of each batch is extrapolated from that. Its prefill counts nothing, nor does its growing context.
The exit status is 1 if transformers was faster.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.measure import WARM_UP, Seconds, add_model_options, describe, load, median, now, step_times, their_run
from bench.tools.results import Results, add_options
from dia_fast.engine import MAX_BATCH, Engine, Handle, Request
from dia_fast.errors import DiaFastError
from dia_fast.model.config import DiaConfig
from dia_fast.model.model import DiaModel


@dataclass(frozen=True)
class Arrival:
    """A request and the moment it comes, in seconds from the start."""

    moment: float
    request: Request


@dataclass
class Outcome:
    """The moment the last request was done, the time spent on steps, and how long requests took on average."""

    end: float
    busy: Seconds
    mean_wait: float

    def figures(self, steps: int) -> dict[str, float]:
        """Return the values of a result. steps: of all requests together."""
        return {
            "total_s": self.end, "steps_per_second": steps / self.end, "mean_wait_s": self.mean_wait,
            "busy_wall_s": self.busy.wall, "busy_cpu_s": self.busy.cpu,
        }  # fmt: skip


def schedule(config: DiaConfig, options: argparse.Namespace) -> list[Arrival]:
    """Draw the arrivals of requests; the same for the same seed."""
    draw = random.Random(options.seed)
    moment, arrivals = 0.0, []
    for number in range(options.requests):
        text = [draw.randrange(1, config.encoder.vocab_size) for _ in range(options.text)]
        steps = draw.randint(*options.steps)
        arrivals.append(Arrival(moment, Request(text, None, steps, options.guidance, seed=number)))
        moment += draw.expovariate(1 / options.gap) if options.gap else 0.0
    return arrivals


def continuous(model: DiaModel, arrivals: Sequence[Arrival], pause: Callable[[float], None]) -> Outcome:
    """Our engine. pause: called between steps, off the clock, with the share of the work that is done."""
    engine = Engine(model, max_batch=min(len(arrivals), MAX_BATCH))
    clock, busy = 0.0, Seconds(0.0, 0.0)
    lengths = [arrival.request.max_new_tokens for arrival in arrivals]
    handles: list[Handle] = []
    ends: dict[int, float] = {}  # when each request was done
    while len(ends) < len(arrivals):
        if len(handles) == len(ends):
            clock = max(clock, arrivals[len(handles)].moment)  # nothing to do before that
        while len(handles) < len(arrivals) and arrivals[len(handles)].moment <= clock:
            handles.append(engine.submit(arrivals[len(handles)].request))
        start = now()
        engine.step()
        span = now().since(start)
        clock, busy = clock + span.wall, Seconds(busy.wall + span.wall, busy.cpu + span.cpu)
        for number, handle in enumerate(handles):
            if handle.done and number not in ends:
                handle.result()  # raises what went wrong
                ends[number] = clock
        pause(sum(lengths[number] for number in ends) / sum(lengths))
    waits = [end - arrivals[number].moment for number, end in ends.items()]
    return Outcome(clock, busy, sum(waits) / len(waits))


def static(arrivals: Sequence[Arrival], size: int, step: Seconds) -> Outcome:
    """Batches in the order of arrival, as long as their longest, every step taking `step`."""
    clock, busy, waits = 0.0, Seconds(0.0, 0.0), []
    for first in range(0, len(arrivals), size):
        batch = arrivals[first : first + size]
        steps = max(arrival.request.max_new_tokens for arrival in batch)
        clock = max(clock, batch[-1].moment) + steps * step.wall
        busy = Seconds(busy.wall + steps * step.wall, busy.cpu + steps * step.cpu)
        waits += [clock - arrival.moment for arrival in batch]
    return Outcome(clock, busy, sum(waits) / len(waits))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if transformers was faster."""
    parser = argparse.ArgumentParser(prog="ragged", description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--steps", type=int, nargs=2, default=(50, 400), metavar=("LEAST", "MOST"))
    parser.add_argument("--gap", type=float, default=5.0, help="mean seconds between arrivals")
    parser.add_argument("--static", type=int, default=8, help="requests in a batch of transformers")
    parser.add_argument("--samples", type=int, default=4, help="short runs of transformers to time its step by")
    parser.add_argument("--sample-steps", type=int, default=3, help="timed steps in each")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    try:
        model, theirs = load(options)
        results = Results(parser, options, arguments, model.device)
    except DiaFastError as error:
        print(f"ragged: {error}", file=sys.stderr)
        return 2
    arrivals = schedule(model.config, options)
    steps = [arrival.request.max_new_tokens for arrival in arrivals]
    lengths = f"{len(steps)} requests of {min(steps)} to {max(steps)} steps, {sum(steps)} in all"
    print(f"{describe(model, options)}\n{lengths}, arriving within {arrivals[-1].moment:.0f} s", flush=True)
    spans: list[Seconds] = []

    def sample(done: float) -> None:
        if theirs is not None and len(spans) < options.sample_steps * (1 + int(done * (options.samples - 1))):
            short = [
                Request(arrival.request.text_ids, None, WARM_UP + 1 + options.sample_steps, options.guidance)
                for arrival in arrivals[: options.static]
            ]
            spans.extend(step_times(their_run(theirs, model.config, short))[: options.sample_steps])

    ours = continuous(model, arrivals, sample)
    outcomes = {"dia-fast, one engine, measured": ours}
    if theirs is not None:
        step = median(spans)
        name = f"transformers, static batches of {options.static}, extrapolated"
        outcomes[name] = static(arrivals, options.static, step)
        print(
            f"a step of transformers' batch: median {step.wall:.2f} s wall, {step.cpu:.2f} s CPU, {len(spans)} steps "
            "over the whole run"
        )
    for name, outcome in outcomes.items():
        print(
            f"{name}: done after {outcome.end:.0f} s ({sum(steps) / outcome.end:.2f} steps of a request per second); "
            f"busy {outcome.busy.wall:.0f} s wall, {outcome.busy.cpu:.0f} s CPU; mean wait {outcome.mean_wait:.0f} s"
        )
        results.add({"side": name.partition(",")[0], "measured": outcome is ours}, outcome.figures(sum(steps)))
    if len(outcomes) == 1:
        return results.end(0)
    _, other = outcomes.values()
    print(
        f"throughput, times transformers': {other.end / ours.end:.2f} until the last is done; of the time busy: wall "
        f"{other.busy.wall / ours.busy.wall:.2f}, CPU {other.busy.cpu / ours.busy.cpu:.2f}"
    )
    return results.end(int(ours.end > other.end))


if __name__ == "__main__":
    sys.exit(main())
