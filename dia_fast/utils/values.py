"""Values as callers pass them, turned into the plain kind that the code behind counts on."""

import math
import operator
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsIndex

from dia_fast.errors import InputError, shown

if TYPE_CHECKING:
    from torch import Tensor


def whole_number(name: str, value: object, least: int, most: int | None = None, hint: str = "") -> int:
    """`value` as a Python int; integers of numpy and torch count, so does 300.0, and no bool.

    Raises:
        InputError: For a value that cannot be used.
    """
    try:
        if isinstance(value, Real) and not isinstance(value, SupportsIndex) and float(value).is_integer():
            value = int(float(value))
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # arrays, tensors, a fraction beyond all floats
        raise InputError(f"{name} must be a whole number, not {shown(value)}") from None
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be {wanted}, not {shown(number)}" + (f"; {hint}" if hint else ""))
    return number


def real_number(name: str, value: object) -> float:
    """`value` as a Python float, infinite if it is too large for one.

    Raises:
        InputError: For what is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} must be a number, not {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def tensor_of(name: str, value: Any) -> "Tensor":
    """`value` as a dense tensor; on the device it is on, and without a copy if it can be.

    Raises:
        InputError: For a value that cannot be used.
    """
    import numpy as np  # settings and texts are checked without them
    import torch

    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()  # torch warns of memory that it may not write to
    try:
        # A caller's default device would move even a tensor.
        tensor = (value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be a tensor or an array of numbers, not {shown(value)}") from None
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type == "meta":
        raise InputError(f"{name} must be a dense tensor with contents, not {tensor.layout} on {tensor.device}")
    return tensor
