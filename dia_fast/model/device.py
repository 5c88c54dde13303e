"""Resolve device, ops and dtype of a model from the caller's arguments or from the machine."""

from types import ModuleType

import torch

from dia_fast.errors import InputError, shown
from dia_kernels import get_ops, with_ops
from dia_kernels.ops import OwnOps

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def choose_device(device: torch.device | str | int | None) -> torch.device:
    """The device to use: as given, or the first GPU, or the CPU. An `int` counts GPUs, as in torch.

    Raises:
        InputError: For a device that torch does not know or that this machine does not have.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise InputError(f"device {shown(device)} is unknown; use 'cpu', 'cuda', 'cuda:1' and so on") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r} cannot be used: torch {torch.__version__} sees no GPU; use 'cpu'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(device)!r} does not exist: torch sees {torch.cuda.device_count()} GPUs")
    if chosen.type == "meta":
        raise InputError("device 'meta' holds no data; use 'cpu' or 'cuda'")
    try:
        torch.empty(1, device=chosen, dtype=torch.float32)
    except Exception as error:  # each device type has its own way to say no
        told = f"torch {torch.__version__} cannot compute on {chosen.type} here ({type(error).__name__})"
        raise InputError(
            f"device {str(device)!r} cannot be used: {told}; use 'cpu' or, with an NVIDIA or AMD GPU, 'cuda'"
        ) from None
    return chosen


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The type of weights and activations: as given, or float32 on a CPU, bfloat16 on a GPU (float16 if it lacks that).

    The type that a checkpoint is stored in does not matter: weights are converted while they load. On an x86 CPU the
    narrow types are faster than float32 too, and take half the memory (see `DiaModel.pack`).
    """
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        narrow = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if narrow else torch.float16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or chosen not in DTYPES.values():
        raise InputError(f"dtype {shown(dtype)} is not supported; use float32, bfloat16 or float16 (fp32, bf16, fp16)")
    return chosen


def choose_ops(backend: str, device: torch.device, own: OwnOps | None = None) -> ModuleType:
    """The op set of a backend, see `dia_kernels.get_ops`, with some ops replaced, see `dia_kernels.with_ops`.

    Raises:
        InputError: For a backend that is unknown or cannot run there, a `DIA_KERNELS_TABLE` that cannot be read, or ops
            that cannot be.
    """
    try:
        ops = get_ops(backend, device)
        return ops if own is None else with_ops(ops, own)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
