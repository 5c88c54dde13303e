"""Weights laid out for FBGEMM's half-precision product: what makes 16-bit inference fast on an x86 CPU.

Most CPUs have no 16-bit matrix product worth the name: torch's reads a few gigabytes of bf16 weights per second.
FBGEMM, which comes with torch on x86, keeps weights in fp16, widens them in registers and sums products in float32: for
the few rows of a decode step that runs at the speed of the memory.
"""

import functools
import math
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

_MOST_ROWS = 128  # of one call, at most; more are multiplied in several
_MAPPED = 10 << 20  # float32 elements that malloc always maps by themselves: freed, they leave no hole in the heap
_TOP = 15  # a packed weight's largest magnitude is in [2^14, 2^15); fp16 ends just below 2^16


class PackedWeight:
    """A matrix `[features, hidden]` in the layout of FBGEMM, as fp16 times a power of two.

    The power brings the largest magnitude into [2^14, 2^15). Below, fp16 has 11 bits of mantissa down to 2^-14 and then
    steps of 2^-24, so a bf16 weight (8 bits) is represented exactly unless it is smaller than 2^-31 of the largest, and
    then with an error below 2^-39 of it. An fp16 weight is exact unless its matrix holds something from 2^15 on.
    """

    def __init__(self, weight: Tensor, largest: float) -> None:
        """weight: on the CPU; it is copied. largest: the greatest magnitude in it, finite."""
        self.shape = weight.shape
        # What is below 2^-105 throughout keeps a power whose inverse float32 can hold.
        self._scale = 2.0 ** max(math.frexp(largest)[1] - _TOP, -120)
        scratch = torch.empty(max(weight.numel(), _MAPPED), dtype=torch.float32, device="cpu")
        wide = scratch[: weight.numel()].view(weight.shape).copy_(weight).mul_(1 / self._scale)
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(wide, None)

    def linear(self, x: Tensor) -> Tensor:
        """`x @ weight.T` in float32, summed in float32 and not rounded. A row's bits do not depend on the other rows.

        x: `[rows, hidden]` of a float dtype. Returns `[rows, features]`.
        """
        rows, most = x.shape[0], row_counts()[-1]
        if rows > most:
            return torch.cat([self.linear(part) for part in x.split(most)])
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(_padded(x), self._packed)
        return result[:rows].mul_(self._scale)

    def unpack(self) -> Tensor:
        """The matrix `[features, hidden]` in float32, as it is multiplied."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return weight * self._scale

    def __repr__(self) -> str:
        return f"PackedWeight({list(self.shape)})"


def pack(weight: Tensor) -> Tensor | PackedWeight:
    """The weight of a projection, `[features, hidden]`, as the other ops multiply it fastest.

    On an x86 CPU a 16-bit weight becomes a `PackedWeight`, a copy. Everything else comes back as it is: float32, other
    devices and processors, and weights with an infinity or a NaN, which fp16 would hide.
    """
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    if weight.device.type != "cpu" or not narrow or weight.ndim != 2 or not weight.numel():
        return weight
    if torch.backends.quantized.engine not in ("x86", "fbgemm") or not row_counts():
        return weight
    least, most = (float(extreme) for extreme in weight.aminmax())
    largest = max(-least, most)
    return PackedWeight(weight, largest) if math.isfinite(least) and math.isfinite(most) else weight


def _padded(x: Tensor) -> Tensor:
    """x in float32, with rows of zeros behind it up to a count that keeps the order of summation."""
    rows, counts = x.shape[0], row_counts()
    count = counts[bisect_left(counts, rows)]
    if count == rows:
        return x.float()
    wide = torch.zeros(count, x.shape[1], dtype=torch.float32, device="cpu")
    wide[:rows] = x
    return wide


@functools.cache
def row_counts() -> tuple[int, ...]:
    """The numbers of rows whose products are summed in one and the same order, ascending; none without FBGEMM.

    FBGEMM cuts the rows into blocks, by a table for each instruction set, and its kernels for the smallest blocks have
    orders of their own. Which counts avoid those is found out by trying: the same row, multiplied in all positions.
    """
    generator = torch.Generator().manual_seed(0)
    weight, row = (
        torch.randn(33, 1100, generator=generator, dtype=torch.float32, device="cpu"),
        torch.randn(1, 1100, generator=generator, dtype=torch.float32, device="cpu"),
    )
    groups: dict[bytes, list[int]] = {}
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        for count in range(1, _MOST_ROWS + 1):
            results = torch.ops.quantized.linear_dynamic_fp16(row.repeat(count, 1), packed)
            if bool((results == results[0]).all()):
                groups.setdefault(results[0].numpy().tobytes(), []).append(count)
    except (AttributeError, RuntimeError):  # a torch without the operator, or a processor that FBGEMM does not serve
        return ()
    most_common = max(groups.values(), key=len)
    return tuple(most_common)
