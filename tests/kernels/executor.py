"""Decides what runs the Triton kernels of a test session: a GPU, a driver somebody installed, or the interpreter."""

import importlib.util
import os
import sys

import torch


def driver_installed() -> bool:
    """Tell whether Triton has a driver for CPU tensors (the emulator's pytest plugin installs one early)."""
    triton = sys.modules.get("triton")
    if triton is None or triton.knobs.runtime.interpret:
        return False
    try:
        return torch.device(triton.runtime.driver.active.get_active_torch_device()).type == "cpu"
    except RuntimeError:
        return False


def interpreted() -> bool:
    """Tell whether kernels of this process are interpreted."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def choose() -> None:
    """Turn the interpreter on unless there is something that runs compiled kernels. Call before Triton is imported."""
    if torch.cuda.is_available() or driver_installed() or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return
    if "triton" in sys.modules:
        raise RuntimeError(
            "triton was imported before TRITON_INTERPRET could be set: its own functions are not interpreted"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def device() -> torch.device:
    """The device of the kernel tests' tensors."""
    return torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")
