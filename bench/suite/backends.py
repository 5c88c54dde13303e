"""The op sets that are timed side by side, and why one of them cannot be on a machine."""

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.device import Device
from dia_fast.diagnostics.doctor import ComparingOps, Verdict
from dia_kernels import get_ops, reference, with_ops
from dia_kernels.ops import triton_obstacle

BACKENDS = ("torch", "compile", "triton")
OWN = "own"  # the ops that `--ops` names, in the place of shipped ones


class CompiledOps:
    """The torch reference, each op by itself under `torch.compile`: an op set like the others."""

    name = "compile"

    def __init__(self) -> None:
        # Every shape is compiled for itself; by default torch gives up after eight and runs the op as it is.
        torch._dynamo.config.recompile_limit = 1024
        torch._dynamo.config.accumulated_recompile_limit = 4096
        self._compiled: dict[str, Callable[..., Any]] = {}

    def attention_workspace(self, *args: Any) -> None:
        return None

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)
        if op not in self._compiled:
            self._compiled[op] = torch.compile(getattr(reference, op), dynamic=False)
        return self._compiled[op]


def op_set(backend: str, device: torch.device, own: str | None = None) -> Any:
    """Return the ops of a backend that has no obstacle. own: the place that `--ops` names."""
    if backend == OWN:
        assert own is not None
        return with_ops(get_ops("auto", device), own)
    return CompiledOps() if backend == "compile" else get_ops(backend, device)


def is_shipped(op: str, device: torch.device, own: str | None) -> bool:
    """Tell whether `--ops` leaves an op as it is."""
    return getattr(op_set(OWN, device, own), op) is getattr(get_ops("auto", device), op)


def obstacle(backend: str, device: torch.device) -> str | None:
    """Return the reason why a backend is not timed on `device`, with what is missing; None if it is."""
    if backend == "triton":
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            return "TRITON_INTERPRET is set: interpreted kernels have no time worth knowing; unset it"
        return triton_obstacle(device)
    if backend == "compile":
        if device.type == "cpu" and compiler() is None:
            return "torch.compile needs a C++ compiler on a CPU; none of $CXX, g++, clang++ is there"
        if device.type != "cpu" and importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton on a GPU; install it"
    return None


@functools.cache
def compiler() -> str | None:
    """Return the C++ compiler that torch.compile would call."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)


def vectors(device: torch.device) -> str:
    """Return the vector instructions in torch.compile's C++ for a CPU, which it finds by compiling a trial."""
    if device.type != "cpu":
        return "the GPU's"
    try:
        from torch._inductor import cpu_vec_isa

        return str(cpu_vec_isa.pick_vec_isa()) if cpu_vec_isa.valid_vec_isa_list() else "none"
    except (ImportError, AttributeError):  # the name is not public
        return "unknown"


def captured(device: Device, work: Callable[[], None]) -> tuple[Callable[[], None], bool]:
    """Return a graph of `work` and True; or `work` and False where a graph cannot hold it, or there are none."""
    if not device.gpu:
        return work, False
    try:
        return device.capture(work), True
    except Exception as error:  # torch has many names for it
        print(f"not as a graph: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
        device.synchronize()
        return work, False


def compare(ops: Any, call: Callable[[Any], Any]) -> list[Verdict]:
    """Return the wrong results of `call(ops)`: the verdicts of `dia-fast doctor` on the ops that it called."""
    comparing = ComparingOps(ops)
    call(comparing)
    return [verdict for verdict in comparing.verdicts() if verdict.outcome != "unchecked"]
