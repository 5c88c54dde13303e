"""Describe the machine for a report: hardware, driver and versions; no name, no folder, no user.

    python -m bench.environment DEVICE

Prints JSON. `bench.gpu` calls it in a process of its own. Exit status 2 where the device cannot be used.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.device import Device
from dia_fast.diagnostics.doctor import environment
from dia_fast.errors import DiaFastError
from dia_fast.model.device import choose_device

QUERY = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"  # none of it tells one card from another


def collect(device: torch.device) -> dict[str, Any]:
    """Facts by name."""
    found: dict[str, Any] = {**environment(device), "device": Device(device).name, "commit": commit()}
    if device.type != "cuda":
        return found | {"processor": platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    found |= {
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    try:
        # Not by number: torch counts what CUDA_VISIBLE_DEVICES leaves, nvidia-smi all cards.
        asked = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        found |= dict(zip(QUERY.split(","), (value.strip() for value in said.split(",")), strict=False))
    except (OSError, subprocess.SubprocessError):
        pass  # not an NVIDIA GPU, or without its tools: the versions above remain
    return found


def commit() -> str:
    """Return the commit of this checkout, with a plus if files differ from it; empty outside of a checkout."""
    try:
        asked = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(asked, cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def main() -> int:
    """Entry point; returns the exit status."""
    try:
        print(json.dumps(collect(choose_device(sys.argv[1])), indent=1))
    except DiaFastError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
