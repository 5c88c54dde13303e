"""Memory that is not there: told by one error at every door, whoever noticed it."""

import torch

from dia_fast.errors import OutOfMemory

# On a CPU torch has no class of its own for it. C++ throws std::bad_alloc.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
_HELP = (
    "speak fewer or shorter texts at once (max_batch, memory), train with a smaller batch_size, use bfloat16, or "
    "end what else uses it; `dia-fast info MODEL --batch N` computes what a run takes"
)


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """The error of dia_fast that stands for another one, or None if that is not about memory.

    Args:
        error: of Python, numpy, torch or a driver.
    """
    if isinstance(error, OutOfMemory):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        where = "the GPU has"
    elif isinstance(error, MemoryError):
        where = "the machine has"
    elif isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
        where = "the GPU has" if "CUDA" in str(error) else "the machine has"
    else:
        return None
    first = str(error).strip().partition("\n")[0][:200]
    told = OutOfMemory(f"{where} no memory left{f' ({first})' if first else ''}: {_HELP}")
    told.__cause__ = error
    return told
