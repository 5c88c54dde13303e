"""The choice between the two op sets, made once per model."""

import difflib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import torch

from dia_kernels import launcher

OwnOps: TypeAlias = Mapping[str, Callable[..., Any]] | ModuleType | str

BACKENDS = ("auto", "torch", "triton")
_BESIDE = {"attention_workspace", "snake_residual"}  # ops without a config of their own
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


def with_ops(base: ModuleType, own: OwnOps) -> ModuleType:
    """Return an op set in which some ops are another's.

    Args:
        base: The op set that all others are taken from.
        own: Ops by name; a module, whose functions of these names are taken; or `"module"` or `"module:name"`, to be
            imported, for either of the two.

    Raises:
        ValueError: A name is that of no op, something is no function, or nothing can be imported by the name.
    """
    found = _imported(own) if isinstance(own, str) else own
    known = [name for name in base.__all__ if name in launcher.OPS | _BESIDE]
    if isinstance(found, ModuleType):
        given = {name: vars(found)[name] for name in known if name in vars(found)}
        if not given:
            raise ValueError(f"ops: {found.__name__} defines none of {', '.join(known)}")
    elif isinstance(found, Mapping):
        given = dict(found)
    else:
        raise ValueError(f"ops: must be a mapping of names to functions, a module or 'module:name', not {found!r}")
    for name, op in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.0)[0]
            raise ValueError(f"ops: {name!r} is no op of {base.__name__}; did you mean {near!r}?")
        if not callable(op):
            raise ValueError(f"ops: {name} must be a function, not {op!r}")
    made = ModuleType(f"{base.__name__} with {', '.join(given)} replaced")
    vars(made).update({name: getattr(base, name) for name in base.__all__} | given)
    vars(made).update(name=base.name, __all__=list(base.__all__))
    return made


def _imported(place: str) -> Any:
    name, _, attribute = place.partition(":")
    try:
        module = importlib.import_module(name)
        return getattr(module, attribute) if attribute else module
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"ops: cannot import {place!r}: {error}") from error


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
