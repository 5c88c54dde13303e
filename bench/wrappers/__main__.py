"""Do other people's programs run on dia-fast as they are, and do they choose the same codes as on their own code?

    python -m bench.wrappers [--original CHECKOUT] [--generation first|second] NAME=CHECKOUT ...

Each program is driven in processes of its own, on dia-fast and on the copy of the original package that it carries
(`--original`: nari-labs/dia at 2811af1, for the one that carries none), on tiny random weights, greedily. Where a copy
is known to differ from 2811af1, it is driven once more with those lines mended in a temporary copy. Prints a line for
each sound: frames of codes that are equal from the start on, of those that its own code makes. A checkout is read only.
Exit status 1 if a program failed on dia-fast, other than one that cannot load the second generation by itself.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.tools.results import Results, add_options
from bench.wrappers.mends import mended
from bench.wrappers.programs import PROGRAMS
from bench.wrappers.weights import make
from dia_fast.errors import DiaFastError

CARRY_NONE = ("tts-webui",)  # which import an installed original


def drive(name: str, place: Path, folder: Path, side: str, environment: dict[str, str]) -> str | None:
    """Run a program; return the first line of its last error, or None."""
    command = [sys.executable, "-m", "bench.wrappers.programs", name, str(place), str(folder), "--side", side]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    (folder / f"{name}-{side}.txt").write_text(done.stdout + done.stderr)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])[:160]


def same_frames(ours: np.ndarray, own: np.ndarray, dropped: int = 0) -> int:
    """Count the frames of codes `[frames, channels]`, from the start on, that are the same in both.

    dropped: the first frames of ours that the program makes and does not decode.
    """
    ours = ours[dropped:]
    count = min(len(ours), len(own))
    differs = np.flatnonzero((ours[:count] != own[:count]).any(1))
    return int(differs[0]) if len(differs) else count


def sounds(folder: Path, name: str, side: str) -> dict[str, list[np.ndarray]]:
    """Read the codes of a program's sounds on a side, in the parts that were decoded."""
    found: dict[str, list[np.ndarray]] = {}
    for key, part in np.load(folder / f"{name}-{side}.npz").items():
        found.setdefault(key.split(":")[0], []).append(part)
    return found


def counted(ours: list[np.ndarray], own: list[np.ndarray], dropped: int) -> str:
    """Say how many frames are equal, of those of its own code."""
    if not own:
        return "fails"
    equal = sum(same_frames(part, other, dropped) for part, other in zip(ours, own, strict=False))
    return f"{equal} of {sum(len(part) for part in own)}"


def compare(
    name: str, place: Path, folder: Path, environment: dict[str, str], original: Path | None
) -> dict[str, dict[str, str]]:
    """Drive a program on its own code, and with that mended; return the frames that are equal, by side and sound."""
    if name in CARRY_NONE and original:
        paths = environment["PYTHONPATH"], str(original.resolve())
        environment = environment | {"PYTHONPATH": os.pathsep.join(paths)}
    sides = {"own": place}
    if mend := PROGRAMS[name].mend:
        try:
            sides["mended"] = mended(place, folder / f"{name}-mended", mend)
        except ValueError as missing:
            print(f"{name:<18} is not mended, since it is of another commit: {missing}")
    ours = sounds(folder, name, "ours")
    found: dict[str, dict[str, str]] = {}
    for side, at in sides.items():
        if (error := drive(name, at, folder, side, environment)) is not None:
            print(f"{name:<18} its own code ({side}) fails here: {error}")
            found[side] = {}
            continue
        theirs = sounds(folder, name, side)
        found[side] = {
            sound: counted(ours[sound], theirs[sound], PROGRAMS[name].dropped) for sound in ours if sound in theirs
        }
    return found


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
        print(f"{'program':<18} {'sound':<13} {'on dia-fast':>11}{'own code':>16}{'mended':>16}")
        for given in options.programs:
            name, _, place = given.partition("=")
            if (error := drive(name, Path(place), folder, "ours", environment)) is not None:
                known = options.generation == "second" and PROGRAMS[name].first_only
                failed |= not known
                told = "loads the first generation alone" if known else "FAILS on dia-fast"
                print(f"{name:<18} {told}: {error}", flush=True)
                results.add({"program": name, "sound": "", "generation": options.generation}, {"error": error})
                continue
            counts = compare(name, Path(place), folder, environment, options.original)
            for sound, parts in sounds(folder, name, "ours").items():
                found = {side: column.get(sound, "fails") for side, column in counts.items()}
                frames = sum(len(part) for part in parts)
                print(f"{name:<18} {sound:<13} {frames:>11}" + "".join(f"{told:>16}" for told in found.values()))
                case = {"program": name, "sound": sound, "generation": options.generation}
                results.add(case, {"frames": frames} | {f"{side}_equal": told for side, told in found.items()})
    return results.end(int(failed))


if __name__ == "__main__":
    sys.exit(main())
