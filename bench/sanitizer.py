"""Run a decode step with programmatic dependent launch under NVIDIA's compute-sanitizer.

    python -m bench.sanitizer [--device cuda] [--tool memcheck]

The step of one layer, captured as the engine does it. The exit status is 1 if the tool reports an error.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

PROGRAM = "compute-sanitizer"  # comes with the CUDA toolkit


def command(device: str, tool: str) -> list[str]:
    """Return the command that is run."""
    step = [sys.executable, "-m", "bench.ablation", "--device", device, "--whole", "--layers", "1", "--rows", "2"]
    return [PROGRAM, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all", *step]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="sanitizer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "synccheck", "initcheck"), default="memcheck")
    options = parser.parse_args(arguments)
    try:
        return subprocess.run(command(options.device, options.tool), check=False).returncode
    except FileNotFoundError:
        print(f"sanitizer: {PROGRAM} is not installed; it comes with the CUDA toolkit", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
