"""Time the first sound of a stream for several chunk lengths, and the cost of streaming overall.

    python -m bench.latency [--model FOLDER] [--codec FOLDER] [--chunks 0.1 0.5 2] [--steps 200] [--rounds 3]

Every round speaks the same text once in one call, whose first sound is its last, and once with each chunk length, in
one process and in turns. Without `--model` a tiny random one speaks, which shows the shape of the table and nothing
else. Without `--codec` random weights decode, in the size of the official codec (small beside the tiny model).
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench.measure import DTYPES, Seconds, describe_machine, load, median, now, use
from bench.tools.results import Results, add_options
from dia_fast import Dia, DiaFastError, TextWarning
from dia_fast.audio.codec import Codec, CodecConfig, load_codec, random_codec
from dia_fast.model.device import choose_device
from dia_fast.model.quantization import FLOAT

TEXT = "[S1] Did you hear that? [S2] Hear what? [S1] It was a bell, far away. [S2] There is no bell here."


def codec_for(options: argparse.Namespace) -> Codec:
    """Return the codec that the options name, or one of random weights, small unless a model is named."""
    if options.codec:
        return load_codec(options.codec, device=options.device)
    return random_codec(CodecConfig() if options.model else CodecConfig(decoder_hidden_size=32), device=options.device)


class Taken(NamedTuple):
    """Decode steps until the first sound, the time until then, and the time until the last."""

    steps: int
    first: Seconds
    all: Seconds


def time_at_once(dia: Dia, steps: int) -> Taken:
    """One call, where all the sound comes at the end."""
    before, start = dia.engine.steps, now()
    dia.generate(TEXT, seed=0, max_new_tokens=steps)
    taken = now().since(start)
    return Taken(dia.engine.steps - before, taken, taken)


def time_stream(dia: Dia, steps: int, chunk_seconds: float) -> Taken:
    """Time a stream of so many steps."""
    before, start, first = dia.engine.steps, now(), None
    for _ in dia.stream(
        TEXT, chunk_seconds=chunk_seconds, first_chunk_seconds=chunk_seconds, seed=0, max_new_tokens=steps
    ):
        first = first or (dia.engine.steps - before, now().since(start))
    assert first is not None
    return Taken(*first, now().since(start))


def report(dia: Dia, options: argparse.Namespace, results: Results) -> None:
    """Run every way in turns and print the medians as a table."""
    taken: dict[float, list[Taken]] = {length: [] for length in [0.0, *options.chunks]}
    dia.generate(TEXT, seed=0, max_new_tokens=min(options.steps, 24))  # what is made at first use does not count
    for _ in range(options.rounds):
        for length, times in taken.items():
            times.append(time_stream(dia, options.steps, length) if length else time_at_once(dia, options.steps))
    frames = options.steps - max(dia.config.delay_pattern) - 1
    print(
        f"{describe_machine(dia.device)}; torch {torch.__version__}\n{dia}, {dia.codec}\n"
        f"{frames * dia.codec.hop_length / dia.codec.sample_rate:.2f} s of sound in {options.steps + 1} steps; medians "
        f"of {options.rounds} rounds; seconds on the wall clock (of processor time)\n\n"
        "| chunk | steps before the first sound | first sound | all of it |\n|---|---:|---:|---:|"
    )
    for length, times in taken.items():
        first, end = median([item.first for item in times]), median([item.all for item in times])
        name = f"{length:g} s" if length else "in one call"
        span = f"{first.wall:.2f} ({first.cpu:.2f}) | {end.wall:.2f} ({end.cpu:.2f})"
        print(f"| {name} | {times[0].steps} | {span} |")
        results.add(
            {"chunk_s": length or None},
            {
                "steps_before": times[0].steps, "first_wall_s": first.wall, "first_cpu_s": first.cpu,
                "total_wall_s": end.wall, "total_cpu_s": end.cpu,
            },
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder, file or Hub id; bench.make_checkpoint makes one (default: a tiny one)")
    parser.add_argument("--codec", help="folder, file or Hub id (default: random weights)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, for the tiny model float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--chunks", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0], help="lengths in seconds")
    parser.add_argument("--steps", type=int, default=180, help="rows of speech (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    add_options(parser)
    parser.set_defaults(against=None, weights=FLOAT)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", TextWarning)  # the speech is cut on purpose
    with tempfile.TemporaryDirectory() as folder:
        try:
            options.device = use(choose_device(options.device))
            codec = codec_for(options)
            options.dtype = options.dtype or ("bfloat16" if options.model else "float32")
            if not options.model:
                from bench.tools.tiny_models import make_transformers_checkpoint

                options.model = str(make_transformers_checkpoint(Path(folder) / "model"))
            results = Results(parser, options, arguments, options.device)
            report(Dia(load(options)[0], codec), options, results)
        except DiaFastError as error:
            print(f"latency: {error}", file=sys.stderr)
            return 2
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
