"""Speak N streams at once by one engine in one process: first sound, gaps, frames per second, steps and frames wasted.

    python -m bench.serving [--model demo] [--streams 1 8 32] [--chunk 0.1] [--steps 300] [--json FILE]

Each stream has a thread that takes its chunks as fast as they come; the engine makes its steps in a thread of its own,
and the codec decodes in another. All times include the codec. A stream stalls if a chunk comes after those before it
have been played. Wasted are steps beyond those of the longest stream, and frames decoded beyond those delivered.
"""

import argparse
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from bench.measure import DTYPES, describe_machine, use
from bench.tools.results import Results, add_options
from dia_fast import Dia, DiaFastError, TextWarning
from dia_fast.engine import EngineEvent
from dia_fast.model.device import choose_device

TEXT = "[S1] Please open the red door. [S2] The number is two. [S1] The blue book is here."


@dataclass
class Heard:
    """One stream: when each chunk came, in seconds from the start, and how long each sounds."""

    came: list[float] = field(default_factory=list)
    sounds: list[float] = field(default_factory=list)
    error: Exception | None = None

    @property
    def stall(self) -> float:
        """The longest time by which a chunk came too late to be played without a gap."""
        played, worst = self.came[0], 0.0
        for came, seconds in zip(self.came, self.sounds, strict=True):
            worst = max(worst, came - played)
            played = max(played, came) + seconds
        return worst


@dataclass(frozen=True)
class Row:
    """The figures of so many streams; times in seconds."""

    streams: int
    first_median: float
    first_worst: float
    stall_worst: float
    frames_per_second: float
    realtime_factor: float
    steps: int
    wasted_steps: int
    decoded_per_frame: float


def listen(dia: Dia, seed: int, options: argparse.Namespace, start: float, heard: Heard) -> None:
    """Take one stream to its end."""
    chosen = {"seed": seed, "max_new_tokens": options.steps}
    try:
        for chunk in dia.stream(TEXT, chunk_seconds=options.chunk, first_chunk_seconds=options.chunk, **chosen):
            heard.came.append(time.perf_counter() - start)
            heard.sounds.append(chunk.duration)
    except Exception as error:
        heard.error = error


def measure(dia: Dia, count: int, options: argparse.Namespace) -> Row:
    """Speak `count` streams at once."""
    needed: list[int] = []

    def event(told: EngineEvent) -> None:
        if told.kind == "ended":
            needed.append(told.steps)

    engine, stage = dia.engine, dia.codec.stage
    assert stage is not None
    engine.on_event = event
    steps, computed, start = engine.steps, stage.computed, time.perf_counter()
    everyone = [Heard() for _ in range(count)]
    threads = [
        threading.Thread(target=listen, args=(dia, seed, options, start, heard)) for seed, heard in enumerate(everyone)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    for heard in everyone:
        if heard.error is not None:
            raise heard.error
    everyone = [heard for heard in everyone if heard.came]
    if not everyone:
        raise DiaFastError("no stream gave a sound: the model said nothing")
    seconds = sum(sum(heard.sounds) for heard in everyone)
    frames = seconds * dia.codec.frames_per_second
    first = sorted(heard.came[0] for heard in everyone)
    return Row(
        streams=count,
        first_median=first[len(first) // 2],
        first_worst=first[-1],
        stall_worst=max(heard.stall for heard in everyone),
        frames_per_second=frames / wall,
        realtime_factor=seconds / wall,
        steps=engine.steps - steps,
        wasted_steps=engine.steps - steps - max(needed),
        decoded_per_frame=(stage.computed - computed) / frames,
    )


def report(dia: Dia, options: argparse.Namespace, results: Results) -> None:
    """Measure each number of streams, and print and note a table."""
    print(
        f"{describe_machine(dia.device)}; torch {torch.__version__}\n{dia}, {dia.codec}; chunks of {options.chunk} s\n"
    )
    print("| streams | first sound, median (worst) | worst stall | frames/s | x realtime | steps (wasted) | decoded |")
    print("|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for count in {1, max(options.streams)}:  # what is made at first use does not count
        warm = [Heard() for _ in range(count)]
        threads = [threading.Thread(target=listen, args=(dia, 0, options, 0.0, heard)) for heard in warm]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for count in options.streams:
        row = measure(dia, count, options)
        results.add({"streams": count}, {name: value for name, value in asdict(row).items() if name != "streams"})
        print(
            f"| {count} | {row.first_median:.3f} s ({row.first_worst:.3f}) | {row.stall_worst:.3f} s | "
            f"{row.frames_per_second:.0f} | {row.realtime_factor:.2f} | {row.steps} ({row.wasted_steps}) | "
            f"{row.decoded_per_frame:.2f} |",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="folder, file or Hub id (default: the demo voice)")
    parser.add_argument("--codec", default="auto", help="folder, file, Hub id, or 'random': of the official size")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--chunk", type=float, default=0.1, help="seconds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="most steps of a stream (default: %(default)s)")
    add_options(parser)
    options = parser.parse_args(arguments)
    if min(options.streams) < 1:
        parser.error("--streams are numbers from 1 on")
    warnings.simplefilter("ignore", TextWarning)  # the speech may be cut on purpose
    try:
        device = use(choose_device(options.device))
        codec = options.codec
        if codec == "random":
            from dia_fast.audio.codec import CodecConfig, random_codec

            codec = random_codec(CodecConfig(), device=device)
        chosen = {"device": device, "dtype": options.dtype, "backend": options.backend, "codec": codec}
        with Dia.from_pretrained(options.model, background=True, **chosen) as dia:
            results = Results(parser, options, arguments, device)
            report(dia, options, results)
    except DiaFastError as error:
        print(f"serving: {error}", file=sys.stderr)
        return 2
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
