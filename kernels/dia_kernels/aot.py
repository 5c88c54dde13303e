"""Compiling the kernels for a GPU that is not there, exactly as their launchers specialise them.

    with compiling("sm_90") as compiled:
        model.decode_step(state)          # tensors on the meta device
    compiled[0].asm["ptx"]

A stand-in for Triton's driver names the target; every launch is turned into `warmup`, which compiles and runs nothing.
Needs a process in which Triton compiles: not one with `TRITON_INTERPRET=1`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from dia_kernels import launcher as launch

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")


@dataclass(frozen=True)
class Compiled:
    """One launch, compiled: kernel's name, grid, arguments, launch options, and Triton's result (`asm`, `metadata`)."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    meta: dict[str, Any]
    result: Any

    @property
    def asm(self) -> dict[str, Any]:
        """Texts and binaries by name: `ptx`, `cubin`, `amdgcn` and the stages before them."""
        return self.result.asm


class _Driver(DriverBase):
    """Names a target; has no device to run on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise RuntimeError(f"nothing runs here: kernels are only compiled, for {self.target.arch}")

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, *_: int) -> tuple[int, int]:
        return divmod(int(self.target.arch), 10) if self.target.backend == "cuda" else (0, 0)

    def get_current_stream(self, *_: int) -> int:
        return 0

    def set_current_device(self, *_: int) -> None:
        return None


def gpu_target(name: str) -> GPUTarget:
    """Triton's name for `sm_90`, `gfx942`, ... Raises ValueError for anything else."""
    if name.startswith("sm_") and name[3:].isdigit():
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target: {name!r} is not of the form sm_90 or gfx942")


@contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """Compile every launch within for `target` instead of running it; yield the list that they are put in.

    Raises RuntimeError where Triton interprets, and whatever Triton raises for a kernel that does not compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton compiles nothing in this process")
    driver = triton.runtime.driver
    before = driver._active
    compiled: list[Compiled] = []

    def compile_only(run: launch.Launcher, kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        # The cache is keyed by device, and every target is device 0: neither another target nor a GPU that really is
        # device 0 may find what is compiled here.
        kernel.device_caches.clear()
        try:
            result = kernel.warmup(*args, grid=grid, **meta)
            named = dict(zip(kernel.arg_names, args, strict=False))
            compiled.append(Compiled(kernel.fn.__name__, grid, named, meta, result))
        finally:
            kernel.device_caches.clear()

    try:
        driver.set_active(_Driver(gpu_target(target)))
        with launch.listening(compile_only):
            yield compiled
    finally:
        driver._active = before  # reset_active would look for a GPU
