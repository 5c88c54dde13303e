"""Weights laid out for one product of a CPU library: what makes inference fast on an x86 CPU.

Each class is one product. All of them promise that a row's bits do not depend on the other rows, nor on their number.
Which one a processor should have is the caller's business: `dia_fast.model.cpu_weights` has the table.
"""

import functools
import math
import threading
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dia_kernels.reference.quantized import Int8Weight
from dia_kernels.reference.weight import PackedWeight

_MOST_ROWS = 128  # of one call, at most; more are multiplied in several
_MAPPED = 10 << 20  # float32 elements that malloc always maps by themselves: freed, they leave no hole in the heap
_TOP = 15  # a packed weight's largest magnitude is in [2^14, 2^15); fp16 ends just below 2^16
_ONEDNN_ROWS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 96, _MOST_ROWS)
_WARNING = threading.Lock()  # filters of warnings belong to the process
_HIGHEST = 63  # of a byte of activations: 127 * 63 * 2 fits into 16 bits
_SMALLEST = torch.finfo(torch.float32).tiny  # a row of zeros is divided by it
_PROBE_FEATURES = 64  # rows of random numbers that a probe repeats to the size of a weight


class FbgemmHalf(PackedWeight):
    """fp16 times a power of two, for FBGEMM: it widens weights in registers and multiplies in float32.

    For a few rows that runs at the speed of the memory on every processor with AVX2. FBGEMM comes with torch on x86.

    The power brings the largest magnitude into [2^14, 2^15). Below, fp16 has 11 bits of mantissa down to 2^-14 and then
    steps of 2^-24, so a bf16 weight (8 bits) is represented exactly unless it is smaller than 2^-31 of the largest, and
    then with an error below 2^-39 of it. An fp16 weight is exact unless its matrix holds something from 2^15 on.
    """

    def __init__(self, weight: Tensor) -> None:
        """weight: on the CPU, finite; it is copied."""
        self.shape = weight.shape
        largest = max(abs(float(extreme)) for extreme in weight.aminmax())
        # What is below 2^-105 throughout keeps a power whose inverse float32 can hold.
        self._scale = 2.0 ** max(math.frexp(largest)[1] - _TOP, -120)
        scratch = torch.empty(max(weight.numel(), _MAPPED), dtype=torch.float32, device="cpu")
        wide = scratch[: weight.numel()].view(weight.shape).copy_(weight).mul_(1 / self._scale)
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(wide, None)

    def linear(self, x: Tensor) -> Tensor:
        """See `PackedWeight.linear`; float32."""
        rows, counts = x.shape[0], row_counts()
        if rows > counts[-1]:
            return torch.cat([self.linear(part) for part in x.split(counts[-1])])
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(_padded(x, counts, torch.float32), self._packed)
        return result[:rows].mul_(self._scale)

    def unpack(self) -> Tensor:
        """See `PackedWeight.unpack`."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return weight * self._scale


class OnednnBfloat16(PackedWeight):
    """bf16 in the blocked layout that oneDNN asks for. Activations and results are rounded to bf16, sums are float32.

    It needs a processor with bf16 products (AVX-512 BF16, AMX); oneDNN emulates them on others, ten times slower. The
    bits are those of torch's own bf16 product for many rows.
    """

    def __init__(self, weight: Tensor) -> None:
        """weight: bfloat16 on the CPU; it is copied."""
        self.shape = weight.shape
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ONEDNN_ROWS[-1])
        onednn_row_counts(*self.shape, torch.get_num_threads())  # found out now, not by the first step

    def linear(self, x: Tensor) -> Tensor:
        """See `PackedWeight.linear`; bfloat16."""
        rows, counts = x.shape[0], onednn_row_counts(*self.shape, torch.get_num_threads())
        if rows > counts[-1]:
            return torch.cat([self.linear(part) for part in x.split(counts[-1])])
        return _onednn(_padded(x, counts, torch.bfloat16), self._packed)[:rows]

    def unpack(self) -> Tensor:
        """See `PackedWeight.unpack`."""
        return self._packed.to_dense().float()


class FbgemmInt8(PackedWeight):
    """int8 with a scale for each output channel, for FBGEMM: sums are integers and exact.

    FBGEMM multiplies bytes by bytes. A row of activations is cut into two of them, the second a 126th of the first:
    together they keep a row to 2^-14 of its largest magnitude. Each is a row of the product. As sums of integers have
    no order, a row's bits do not depend on the others. 7 bits are used of each byte of activations:
    with more, processors without VNNI would cut off sums of two products.
    """

    def __init__(self, weight: Int8Weight) -> None:
        """weight: on the CPU; it is copied."""
        self.shape = weight.shape
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64, device="cpu")
        with _WARNING, warnings.catch_warnings():  # torch means to drop quantized tensors; the product itself stays
            warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
            whole = torch._make_per_channel_quantized_tensor(weight.values, weight.scales.double(), zeros, 0)
        self._packed: Any = torch.ops.quantized.linear_prepack(whole, None)

    @property
    def nbytes(self) -> int:
        """See `PackedWeight.nbytes`."""
        return self.shape.numel() + 4 * self.shape[0]

    def linear(self, x: Tensor) -> Tensor:
        """See `PackedWeight.linear`; float32. A row with a NaN or an infinity has no finite result."""
        rows, wide = x.shape[0], x.float()
        largest = torch.linalg.vector_norm(wide, torch.inf, dim=1, keepdim=True)
        parts = torch.empty(2 * rows, x.shape[1], dtype=torch.float32, device="cpu")
        high, low = parts[:rows], parts[rows:]
        torch.mul(wide, _HIGHEST / largest.clamp(min=_SMALLEST), out=low)
        torch.round(low, out=high)
        low.sub_(high).mul_(2 * _HIGHEST).round_()
        sums: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            parts, 1.0, _HIGHEST + 1, self._packed
        )
        return sums[:rows].add(sums[rows:], alpha=1 / (2 * _HIGHEST)).mul_(largest * (1 / _HIGHEST))

    def unpack(self) -> Tensor:
        """See `PackedWeight.unpack`."""
        whole: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0].dequantize()
        return whole


PRODUCTS: dict[str, tuple[type[Any], tuple[torch.dtype, ...]]] = {
    "fbgemm-fp16": (FbgemmHalf, (torch.bfloat16, torch.float16)),
    "onednn-bf16": (OnednnBfloat16, (torch.bfloat16,)),
    "fbgemm-int8": (FbgemmInt8, (torch.int8,)),
}
"""For each product that has a layout of its own its class, and the dtypes of the weights that it takes."""


def runs_here(product: str) -> bool:
    """Can this processor, with this torch, run a product of `PRODUCTS`?"""
    if product == "onednn-bf16":
        return _onednn_runs()
    if product == "fbgemm-int8":
        return torch.backends.quantized.engine in ("x86", "fbgemm") and _fbgemm_int8_runs()
    return torch.backends.quantized.engine in ("x86", "fbgemm") and bool(row_counts())


def pack(weight: Tensor | Int8Weight, product: str) -> Tensor | PackedWeight:
    """Return a projection's weight, `[features, hidden]`, in the layout of a product of `PRODUCTS`, as a copy.

    What the product does not take comes back as it is: other dtypes and devices, and weights with an infinity or a NaN,
    which fp16 would hide.
    """
    kind, dtypes = PRODUCTS[product]
    if isinstance(weight, Int8Weight):
        return kind(weight) if torch.int8 in dtypes and weight.values.device.type == "cpu" else weight
    if (
        weight.device.type != "cpu"
        or not weight.is_floating_point()
        or weight.dtype not in dtypes
        or weight.ndim != 2
        or not weight.numel()
    ):
        return weight
    if not all(math.isfinite(float(extreme)) for extreme in weight.aminmax()):
        return weight
    packed: PackedWeight = kind(weight)
    return packed


def _padded(x: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x in another dtype, with rows of zeros behind it up to a count that keeps the order of summation."""
    rows = x.shape[0]
    count = counts[bisect_left(counts, rows)]
    if count == rows:
        return x.to(dtype).contiguous()
    wide = torch.zeros(count, x.shape[1], dtype=dtype, device="cpu")
    wide[:rows] = x
    return wide


def _alike(multiply: Callable[[Tensor], Tensor], row: Tensor, counts: Sequence[int]) -> tuple[int, ...]:
    """The numbers of rows whose products are summed in one and the same order, ascending: the largest such group.

    Libraries cut the rows into blocks, and their kernels for some blocks have orders of their own. Which counts avoid
    those is found out by trying: the same row, multiplied in all positions.
    """
    groups: dict[bytes, list[int]] = {}
    for count in counts:
        results = multiply(row.repeat(count, 1)).float()
        if bool((results == results[0]).all()):
            groups.setdefault(results[0].numpy().tobytes(), []).append(count)
    return max((tuple(group) for group in groups.values()), key=len, default=())


def _probe(features: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight of random numbers that is soon made, and a row whose products with it cancel.

    Each number has its negative somewhere else. The sums are therefore nothing but errors of summation, in which every
    order shows, even where the results are rounded to few bits.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    order = torch.randperm(hidden // 2 * 2, generator=generator, dtype=torch.int64, device="cpu")
    half, row = numbers(min(features, _PROBE_FEATURES), hidden // 2), numbers(1, hidden // 2)
    some, x = half.new_zeros(half.shape[0], hidden), row.new_zeros(1, hidden)
    some[:, order], x[:, order] = torch.cat([half, -half], 1), torch.cat([row, row], 1)
    return some.repeat(-(-features // _PROBE_FEATURES), 1)[:features].contiguous(), x


@functools.cache
def row_counts() -> tuple[int, ...]:
    """The numbers of rows that FBGEMM's half-precision product sums in one order; none without FBGEMM.

    FBGEMM's blocks of rows depend on the instruction set and not on the matrix.
    """
    weight, row = _probe(33, 1100, torch.float32)
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        return _alike(lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed), row, range(1, _MOST_ROWS + 1))
    except (AttributeError, RuntimeError):  # a torch without the operator, or a processor that FBGEMM does not serve
        return ()


@functools.cache
def onednn_row_counts(features: int, hidden: int, threads: int) -> tuple[int, ...]:
    """The numbers of rows that oneDNN's bf16 product sums in one order, of those that were tried.

    oneDNN picks a kernel by all three sizes and by the threads that share them: each combination is tried once.
    """
    del threads  # the current number; a part of the key
    weight, row = _probe(features, hidden, torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ONEDNN_ROWS[-1])
    return _alike(lambda x: _onednn(x, packed), row, _ONEDNN_ROWS)


@functools.cache
def _fbgemm_int8_runs() -> bool:
    try:
        one = torch.ones(1, 1, dtype=torch.int8, device="cpu")
        FbgemmInt8(Int8Weight(one, one[0].float())).linear(one.float())
    except (AttributeError, RuntimeError):  # a torch without the operator, or a processor that FBGEMM does not serve
        return False
    return True


@functools.cache
def _onednn_runs() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(onednn_row_counts(33, 1100, 1))
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or a processor that it does not serve
        return False


def _onednn(x: Tensor, packed: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return result
