"""Measure the memory of a process that loads a model by weights in 8 bits on a CPU and makes some steps.

    python -m bench.resident_memory [--weights int8] [--model FOLDER] [--steps 8] [--json FILE]

Without --model, random weights of the size of Dia-1.6B are written to a temporary folder first, and removed afterwards.
Loading and steps are a process of its own. Its peak is what Linux counted as resident at most (VmHWM), torch's own code
included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import make_checkpoint
from bench.measure import DTYPES
from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError, InputError
from dia_fast.model.quantization import INT8, WEIGHTS

CHILD = """
import json, sys
from pathlib import Path

model, weights, dtype, steps = *sys.argv[1:4], int(sys.argv[4])

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

import torch
from dia_fast import Dia
from dia_fast.engine import Request, generate

imported = resident("VmRSS")
dia = Dia.from_pretrained(model, device="cpu", dtype=dtype, weights=weights, codec=None)
loaded, peak = resident("VmRSS"), resident("VmHWM")
[made] = generate(dia.model, [Request(list(b"\\x01 Eight bits."), max_new_tokens=steps, seed=1)])
print(json.dumps({
    "imported_bytes": imported, "loaded_bytes": loaded, "loading_peak_bytes": peak, "peak_bytes": resident("VmHWM"),
    "steps": len(made.delayed_codes),
}))
"""


def measure(model: str, weights: str, dtype: str, steps: int) -> dict[str, Any]:
    """Return bytes by the moment they were resident at. Raises InputError where the process fails."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model, weights, dtype, str(steps)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(
            f"the process that loads the model failed: {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="resident_memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder, file or Hub id (default: random weights of the size of Dia-1.6B)")
    parser.add_argument("--weights", choices=WEIGHTS, default=INT8)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations, keys and values")
    parser.add_argument("--steps", type=int, default=8)
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        if not Path("/proc/self/status").exists():
            raise InputError("the memory of a process is read from /proc, which Linux has")
        results = Results(parser, options, arguments)
        with tempfile.TemporaryDirectory(prefix="dia-fast-") as folder:
            model = options.model
            if model is None:
                model = str(Path(folder) / "model")
                if status := make_checkpoint.main([model, "--dtype", options.dtype]):
                    return status
            found = measure(model, options.weights, options.dtype, options.steps)
    except DiaFastError as error:
        print(f"resident_memory: {error}", file=sys.stderr)
        return 2
    results.add({"weights": options.weights, "dtype": options.dtype}, found)
    parts = ", ".join(
        f"{said} {found[name] / 1e9:.2f} GB"
        for said, name in (
            ("imported", "imported_bytes"), ("loaded", "loaded_bytes"), ("peak of loading", "loading_peak_bytes"),
            ("peak", "peak_bytes"),
        )
    )  # fmt: skip
    print(f"{options.weights}, {options.dtype}, {found['steps']} steps: {parts}")
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
