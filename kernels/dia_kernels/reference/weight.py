"""Matrices that the projections take beside tensors: they lie in memory in a way of their own."""

import torch
from torch import Tensor


class PackedWeight:
    """A matrix `[features, hidden]` in the layout of one product."""

    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return 2 * self.shape.numel()

    def linear(self, x: Tensor) -> Tensor:
        """`x @ weight.T`, summed in float32. A row's bits do not depend on the other rows.

        x: `[rows, hidden]` of a float dtype. Returns `[rows, features]`, in float32 where the product does not round.
        """
        raise NotImplementedError

    def unpack(self) -> Tensor:
        """The matrix `[features, hidden]` in float32, as it is multiplied."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)})"
