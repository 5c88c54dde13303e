"""Weights in 8 bits (W8A16): int8 values, one float32 scale for each output channel.

    weight[n, k] ~ values[n, k] * scales[n]        scales[n] = max over k of |weight[n, k]| / 127

The scale is applied after the sum: `(x @ values.T) * scales`. int8 values are exact in bf16, fp16 and fp32, so a
kernel may widen them to the dtype of the activations without an error of its own.
"""

import torch
from torch import Tensor

from dia_kernels.reference.weight import PackedWeight

LARGEST = 127  # symmetric: -128 is not used
_ELEMENTS = 1 << 22  # widened to float32 at a time
_LEAST_SCALE = torch.finfo(torch.float32).tiny


class Int8Weight(PackedWeight):
    """The values and the scales of a matrix `[features, hidden]`, and the product that is the specification."""

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        """values: `[features, hidden]` int8 in [-127, 127]; scales: `[features]` float32, finite and positive."""
        self.values, self.scales, self.shape = values, scales, values.shape

    @property
    def nbytes(self) -> int:
        """See `PackedWeight.nbytes`."""
        return self.values.nbytes + self.scales.nbytes

    def linear(self, x: Tensor) -> Tensor:
        """See `PackedWeight.linear`; float32."""
        wide, out = x.float(), torch.empty(x.shape[0], self.shape[0], dtype=torch.float32, device=x.device)
        step = max(1, _ELEMENTS // max(self.shape[1], 1))
        for first in range(0, self.shape[0], step):
            block = self.values[first : first + step].float()
            results = out[:, first : first + step]
            if x.device.type == "cpu":  # each row by itself, as `linear._linear` says
                for row, result in zip(wide.unbind(), results.unbind(), strict=True):
                    torch.mv(block, row.clone(), out=result)
            else:
                results.copy_(wide @ block.T)
        return out.mul_(self.scales)

    def unpack(self) -> Tensor:
        """See `PackedWeight.unpack`."""
        return self.values.float().mul_(self.scales[:, None])


def quantize(weight: Tensor) -> Int8Weight:
    """Rounds a matrix to 8 bits, the nearest value in each place, ties to even.

    Args:
        weight: `[features, hidden]`, of a float dtype, finite; on any device, where the result is too.

    Returns:
        A copy. A row of zeros gets the least scale.
    """
    features, hidden = weight.shape
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(features, dtype=torch.float32, device=weight.device)
    step = max(1, _ELEMENTS // max(hidden, 1))
    for first in range(0, features, step):
        rows = weight[first : first + step].to(torch.float32, copy=True)
        scale = (torch.linalg.vector_norm(rows, torch.inf, dim=1) / LARGEST).clamp_(min=_LEAST_SCALE)
        scales[first : first + step] = scale
        values[first : first + step] = rows.div_(scale[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return Int8Weight(values, scales)
