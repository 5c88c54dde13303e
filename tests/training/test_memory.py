"""Memory of the heads and their loss at the full size of Dia-1.6B, measured: every storage that torch allocates."""

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dia_kernels.autograd.differentiable import linear_cross_entropy
from dia_kernels.reference import gradients
from tests.helpers.tolerance import assert_equal_up_to_rounding, nudged

HIDDEN, CHANNELS, VOCAB = 2048, 9, 1028


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made within that still exist; `peak` is the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._watch(storage)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)

    def __enter__(self) -> "LiveBytes":
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight).view(-1, VOCAB)
    return F.cross_entropy(logits.float(), labels.flatten())


def fused(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    total, _ = linear_cross_entropy(x, weight, labels, torch.ones(CHANNELS), gradients)
    return total / labels.numel()


def peak(loss: Callable[..., Tensor], rows: int, dtype: torch.dtype, moved: int = 0) -> tuple[int, Tensor]:
    """Peak of forward and backward beyond the inputs, in bytes, and the gradient of x.

    moved: 0, or the seed of inputs that are moved by a rounding.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_(True)
    weight = (torch.randn(CHANNELS * VOCAB, HIDDEN, generator=generator) * HIDDEN**-0.5).to(dtype).requires_grad_(True)
    labels = torch.randint(0, VOCAB, (rows, CHANNELS), generator=generator)
    if moved:
        x, weight = (nudged(item.detach(), 10 * moved + n).requires_grad_(True) for n, item in enumerate((x, weight)))
    with LiveBytes() as memory:
        loss(x, weight, labels).backward()
    assert x.grad is not None and weight.grad is not None
    return memory.peak, x.grad


def test_the_meter() -> None:
    with LiveBytes() as memory:
        a = torch.ones(1000)
        b = a.view(10, 100)
        c = a + 1
        assert memory.live == memory.peak == 8000
        del a, c
        assert memory.live == 4000 and memory.peak == 8000
        b.add_(1)
        del b
    assert memory.live == 0 and memory.peak == 8000


@pytest.mark.production
@pytest.mark.parametrize("rows", [2048, pytest.param(4096, marks=pytest.mark.slow)])
def test_less_than_half_of_the_plain_one(rows: int) -> None:
    """2048 rows are 24 seconds of speech. The gradient of the weight alone is 72 MiB, whatever the rows."""
    taken, gradient = peak(fused, rows, torch.float32)
    wanted, expected = peak(plain, rows, torch.float32)
    print(f"{rows} rows: {taken / 2**20:.0f} MiB instead of {wanted / 2**20:.0f}")
    assert taken < wanted / 2
    assert_equal_up_to_rounding(
        gradient, [expected, *(peak(plain, rows, torch.float32, seed)[1] for seed in (1, 2, 3))]
    )
