"""Time a batch on a Ray actor beside the same batch without Ray: what the layer costs.

    python -m bench.ray_cost [--items 48] [--rounds 5] [--model demo] [--json FILE]

Both speak the same items, in turns, with one engine and as many threads: once in this process, and once on the only
actor of a cluster that is started here. The time runs from the moment at which the engine is loaded to the last item's
sound. Prints the throughput of each, in terms of the speed of speech, and the ratio of the medians. Needs the extra
ray.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.measure import describe_machine
from bench.serving_http import TEXTS
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.jobs.items import Item
from dia_fast.jobs.ray_pool import PoolOptions, speak_on_ray
from dia_fast.jobs.runner import Spoken, speak_items
from dia_fast.model.device import choose_device

if TYPE_CHECKING:
    from dia_fast import Dia


def make(model: str, device: str, batch: int, threads: int) -> "Dia":
    """Load a model; an actor calls this as well."""
    from dia_fast import Dia

    torch.set_num_threads(threads)
    return Dia.from_pretrained(model, device=device, max_batch=batch)


def items_of(count: int) -> list[Item]:
    """So many short scripts."""
    return [
        Item(
            number, f"i{number}", TEXTS[number % len(TEXTS)], None, None, "", False,
            SamplingParams(seed=number), f"i{number}.wav", {}, "",
        )
        for number in range(count)
    ]  # fmt: skip


def seconds_of(spoken: Iterable[Spoken]) -> float:
    """Seconds of sound of items, all of which must have some."""
    sound = 0.0
    for one in spoken:
        if one.outcome is None:
            raise DiaFastError(f"{one.id}: {one.error}")
        sound += len(one.samples) / one.sample_rate
    return sound


@dataclass(frozen=True)
class Clock:
    """A moment, and the processor seconds so far of this process and those below it."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Clock":
        """Read both."""
        ticks, parents = dict[int, int](), dict[int, int]()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                parts = stat.read_text().rpartition(")")[2].split()
                ticks[int(stat.parent.name)] = int(parts[11]) + int(parts[12])
                parents[int(stat.parent.name)] = int(parts[1])
        own, new = set[int](), {os.getpid()}
        while new:
            own |= new
            new = {pid for pid, parent in parents.items() if parent in new}
        return cls(time.perf_counter(), sum(ticks.get(pid, 0) for pid in own) / os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True)
class Speed:
    """Seconds of sound for each second."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, sound: float, start: Clock, end: Clock) -> "Speed":
        """Between two moments."""
        return cls(sound / (end.wall - start.wall), sound / max(end.cpu - start.cpu, 1e-9))


def here(dia: "Dia", items: list[Item]) -> Speed:
    """Speak in this process."""
    start = Clock.now()
    return Speed.of(seconds_of(speak_items(dia, items)), start, Clock.now())


def on_ray(load: "Callable[[], Dia]", items: list[Item], threads: int) -> Speed:
    """Speak on one actor; the time begins when it is ready."""
    begun, sound, count = list[Clock](), 0.0, 0
    options = PoolOptions("local", actors=1, cpus_per_actor=threads)
    for one in speak_on_ray(items, load, options, begun=lambda: begun.append(Clock.now())):
        sound, count = sound + seconds_of([one]), count + 1
        if count == len(items):  # before the cluster is ended
            end = Clock.now()
    return Speed.of(sound, begun[0], end)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="ray_cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--items", type=int, default=48, help="in a batch job (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of both (%(default)s)")
    parser.add_argument("--least", type=float, default=0.9, help="ratio below which the exit status is 1 (%(default)s)")
    add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if min(options.items, options.batch, options.threads, options.rounds) < 1:
        parser.error("numbers are from 1 on")
    try:
        results = Results(parser, options, arguments)
        device = choose_device(options.device)
        load = partial(make, options.model, str(device), options.batch, options.threads)
        items, found = items_of(options.items), {"here": list[Speed](), "on ray": list[Speed]()}
        print(
            f"{describe_machine(device)}; {options.items} items, {options.batch} at a time; seconds of sound for each"
        )
        print(
            "| round | second here | on Ray | processor second here | on Ray |\n|---:|---:|---:|---:|---:|", flush=True
        )
        with load() as dia:
            here(dia, items[: options.batch])  # what is made at first use
            for number in range(1, options.rounds + 1):
                for name, speed in (("here", here(dia, items)), ("on ray", on_ray(load, items, options.threads))):
                    found[name].append(speed)
                    results.add({"round": number, "where": name}, asdict(found[name][-1]))
                ours, theirs = found["here"][-1], found["on ray"][-1]
                print(
                    f"| {number} | {ours.wall:.2f} | {theirs.wall:.2f} | {ours.cpu:.2f} | {theirs.cpu:.2f} |",
                    flush=True,
                )
    except DiaFastError as error:
        print(f"ray_cost: {error}", file=sys.stderr)
        return 2
    ratios = {
        kind: statistics.median(getattr(speed, kind) for speed in found["on ray"])
        / statistics.median(getattr(speed, kind) for speed in found["here"])
        for kind in ("wall", "cpu")
    }
    print(f"on Ray / here: {ratios['wall']:.3f} by the clock, {ratios['cpu']:.3f} by processor time")
    results.add({"round": "all", "where": "on ray / here"}, ratios)
    return results.end(0 if min(ratios.values()) >= options.least else 1)


if __name__ == "__main__":
    sys.exit(main())
