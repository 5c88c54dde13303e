"""Tolerances from data: what rounding does to a result on this machine, measured beside it.

Processors add up in different orders and take different exponentials, and so do two numbers of threads. A constant that
one machine satisfies says nothing about the next. Here the same function is evaluated several times in the precision
under test, each time with inputs moved by about one rounding, and the errors of those evaluations against float64 are
what a result under test is judged by.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Of two evaluations that are equally good, with normally distributed errors, one has over twice the other's error in
# 30 % of cases where a result is a single number. Over twice the worst of eight it has in 0.8 %; the moved inputs add
# errors of their own, which makes the worst of eight larger still.
EVALUATIONS = 8


def nudged(tensor: Tensor, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor with each element moved by up to one unit in the last place of `dtype`, its own by default.

    A sum with moved terms is what another order of additions makes of it: each partial sum's rounding is a change of
    its terms of that size.
    """
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    moves = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device) * 2 - 1
    return (tensor.double() * (1 + moves * torch.finfo(dtype or tensor.dtype).eps)).to(tensor.dtype)


@contextmanager
def nudged_weights(module: nn.Module, seed: int, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Move all parameters and buffers of a module as `nudged` does, and back."""
    tensors = list({id(t): t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}.values())
    kept = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            tensor.copy_(nudged(tensor, 1000 * seed + number, dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)


def evaluations(evaluate: Callable[..., Tensor], *inputs: Tensor, count: int = EVALUATIONS) -> list[Tensor]:
    """Evaluate a function for its inputs as they are, and for inputs that are moved by a rounding."""
    moved = [[nudged(tensor, 100 * seed + n) for n, tensor in enumerate(inputs)] for seed in range(1, count)]
    return [evaluate(*arguments) for arguments in (inputs, *moved)]


def of_weights(module: nn.Module, evaluate: Callable[[], Tensor], count: int = EVALUATIONS) -> list[Tensor]:
    """Evaluate a module with its weights as they are, and with weights that are moved by a rounding."""
    found = [evaluate().clone()]
    for seed in range(1, count):
        with nudged_weights(module, seed):
            found.append(evaluate().clone())
    return found


def budget(plain: Sequence[Tensor], exact: Tensor) -> float:
    """The largest error allowed: twice that of the worst evaluation, and one rounding of the largest value."""
    assert exact.dtype == torch.float64
    worst = max(float((item.double() - exact).abs().max()) for item in plain)
    return 2 * worst + torch.finfo(plain[0].dtype).eps / 2 * float(exact.abs().max())


def assert_as_good_as(ours: Tensor, plain: Sequence[Tensor], exact: Tensor, name: str = "result") -> None:
    """Assert that a result is about as near to the exact one as the worst of several plain evaluations is.

    Args:
        ours: the result under test, any shape.
        plain: evaluations in the same precision, see `evaluations`.
        exact: the result in float64.
        name: what to call it in the message.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, not {list(exact.shape)}"
    error, allowed = float((ours.double() - exact).abs().max()), budget(plain, exact)
    assert error <= allowed, (
        f"{name}: error {error:.3e}, {error / allowed if allowed else torch.inf:.2f} x what is allowed"
    )


def assert_equal_up_to_rounding(
    ours: Tensor, plain: Sequence[Tensor], name: str = "result", terms: float = 0.0
) -> None:
    """Assert that a result is among the plain evaluations, where nothing exact is to be had.

    It may differ from the first, the one of inputs as they are, by four times what the others differ: its own error and
    that of the first are each allowed twice theirs.

    Args:
        ours: The result under test, any shape.
        plain: Evaluations in the same precision, see `evaluations`.
        name: For the message.
        terms: Magnitude of what was added up to the result, where that cancels: what is 0 in exact arithmetic is
            rounding of that size in one implementation and 0 in another. One rounding of it counts as the others do.
    """
    first = plain[0].double()
    eps = torch.finfo(plain[0].dtype).eps
    others = max(float((item.double() - first).abs().max()) for item in plain)
    allowed = 4 * max(others, eps * terms) + eps * float(first.abs().max())
    difference = float((ours.double() - first).abs().max())
    share = difference / allowed if allowed else torch.inf
    assert difference <= allowed, f"{name}: {difference:.3e} off, {share:.2f} x what is allowed"


def assert_same_numbers(
    ours: Sequence[float], plain: Sequence[Sequence[float]], name: str = "numbers", terms: float = 0.0
) -> None:
    """As `assert_equal_up_to_rounding`, each number by itself; plain: several evaluations in float32 of all of them."""
    for at, found in enumerate(ours):
        column = [torch.tensor([float(row[at])], dtype=torch.float32) for row in plain]
        assert_equal_up_to_rounding(torch.tensor([float(found)], dtype=torch.float64), column, f"{name} {at}", terms)


def exponential_bound(largest: float) -> float:
    """The largest relative error of `exp(x)` in float32 for `|x|` up to `largest`, as 2 to the power of `x * log2(e)`.

    The rounded product is off by a share of `x` itself, which the power makes a share of the result; ten more roundings
    are left to the power and what follows it.
    """
    return (largest + 10) * 2.0**-23


def sum_bound(terms: int, magnitude: Tensor | float) -> Tensor | float:
    """The largest error of a sum of float32 products in any order: proven (Higham 2002, section 3.1).

    Args:
        terms: how many products are added.
        magnitude: the sum of their absolute values.
    """
    unit = 2.0**-24
    return terms * unit / (1 - terms * unit) * magnitude
