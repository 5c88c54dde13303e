"""The choice between the two op sets, made once per model."""

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from dia_kernels import launcher

BACKENDS = ("auto", "torch", "triton")
_TRITON_GPUS = ("cuda", "xpu")  # torch device types that Triton has drivers for; ROCm calls itself cuda


def get_ops(backend: str = "auto", device: torch.device | str = "cpu") -> ModuleType:
    """Return the op set for tensors on `device`: a module with the ops of `dia_kernels.reference` and a `name`.

    Args:
        backend: `torch` runs anywhere; `triton` where Triton can run on `device`: a GPU, or the CPU under
            `TRITON_INTERPRET=1` or under a Triton driver whose torch device is the CPU; `auto` is triton on a GPU and
            torch elsewhere.
        device: Of the tensors.

    Raises:
        ValueError: The backend is unknown or cannot run on the device, or `DIA_KERNELS_TABLE` cannot be read.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown, use one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch" or (backend == "auto" and device.type not in _TRITON_GPUS):
        return importlib.import_module("dia_kernels.reference")
    obstacle = triton_obstacle(device)
    if obstacle is not None:
        raise ValueError(f"backend: {backend!r} cannot run on device {str(device)!r}: {obstacle}")
    if table := os.environ.get("DIA_KERNELS_TABLE"):
        launcher.read_table(table)
    return importlib.import_module("dia_kernels.triton")


def triton_obstacle(device: torch.device | str) -> str | None:
    """Return the reason why Triton cannot run on tensors of `device`, with what would help; None if it can."""
    device = torch.device(device)
    otherwise = "backend='torch' works on any device"
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed; install it (it comes with torch on Linux), or use the torch ops: {otherwise}"
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:  # reads TRITON_INTERPRET
        return None
    try:
        served = torch.device(triton.runtime.driver.active.get_active_torch_device()).type
    except RuntimeError as error:  # no driver finds its hardware
        hint = "on a CPU, set TRITON_INTERPRET=1 before starting Python"
        return f"Triton has no driver here ({error}); {hint}; {otherwise}"
    if served != device.type:
        return f"Triton's driver serves {served!r} tensors; move the model there; {otherwise}"
    return None
