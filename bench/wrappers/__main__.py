"""Do other people's programs run on dia-fast as they are, and do they say the same as on their own code?

    python -m bench.wrappers [--original CHECKOUT] [--generation first|second] NAME=CHECKOUT ...

Each program is driven twice in a process of its own, on dia-fast and on the copy of the original package that it
carries (`--original`: nari-labs/dia at 2811af1, for the one that carries none), on tiny random weights, greedily.
Prints a line for each: what ran, and how much of the sound is equal. A checkout is read only. Exit status 1 if one
failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.tools.results import Results, add_options
from bench.wrappers.programs import PROGRAMS
from bench.wrappers.weights import make
from dia_fast.errors import DiaFastError

CARRY_NONE = ("tts-webui",)  # which import an installed original
HOP = 512  # samples of a frame
SAME = 1e-3  # of full scale: two codecs' rounding, or a file's 16 bits; other codes are other sounds altogether


def drive(name: str, place: Path, folder: Path, side: str, environment: dict[str, str]) -> str | None:
    """Run a program; return the last line of its error, or None."""
    command = [sys.executable, "-m", "bench.wrappers.programs", name, str(place), str(folder), "--side", side]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    (folder / f"{name}-{side}.txt").write_text(done.stdout + done.stderr)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1][:160]


def same_frames(ours: np.ndarray, own: np.ndarray) -> int:
    """Count the frames from the start on that are the same in both."""
    count = min(len(ours), len(own))
    differs = np.flatnonzero(np.abs(ours[:count] - own[:count]) > SAME)
    return (int(differs[0]) if len(differs) else count) // HOP


def compare(folder: Path, name: str) -> str:
    """`what equal/own frames`, for each sound."""
    ours, own = (np.load(folder / f"{name}-{side}.npz") for side in ("ours", "own"))
    return ", ".join(
        f"{what} {same_frames(ours[what], own[what])} of {len(own[what]) // HOP} ({len(ours[what]) // HOP})"
        if len(own[what])
        else f"{what} fails ({len(ours[what]) // HOP})"
        for what in own.files
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.wrappers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="+", metavar="NAME=CHECKOUT", help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--original", type=Path, help="a checkout of nari-labs/dia, for programs that carry none")
    parser.add_argument("--generation", choices=("first", "second"), default="first")
    parser.add_argument("--keep", type=Path, help="an empty folder for weights, sounds and logs")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        results = Results(parser, options, arguments)
    except DiaFastError as wrong:
        print(f"wrappers: {wrong}", file=sys.stderr)
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        environment = make(folder, options.generation)
        print(f"{'program':<20} {'on dia-fast':<34} frames equal, of those on its own code (and on dia-fast)")
        for given in options.programs:
            name, _, place = given.partition("=")
            error = drive(name, Path(place), folder, "ours", environment)
            ran = "runs" if error is None else f"FAILS: {error}"
            failed |= error is not None
            told = ""
            if error is None:
                paths = [environment["PYTHONPATH"]]
                if name in CARRY_NONE and options.original:
                    paths.append(str(options.original.resolve()))
                own = environment | {"PYTHONPATH": os.pathsep.join(paths)}
                error = drive(name, Path(place), folder, "own", own)
                told = compare(folder, name) if error is None else f"its own code fails here: {error}"
                ran += ": " + ", ".join(np.load(folder / f"{name}-ours.npz").files)
            print(f"{name:<20} {ran:<34} {told}", flush=True)
            results.add({"program": name, "generation": options.generation}, {"ran": ran, "frames_equal": told})
    return results.end(int(failed))


if __name__ == "__main__":
    sys.exit(main())
