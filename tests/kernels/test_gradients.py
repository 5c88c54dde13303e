"""Ops that training differentiates: gradients by finite differences, and each kernel against fp64 and the reference."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_kernels.autograd import differentiable
from dia_kernels.reference import gradients as reference
from tests.kernels import executor
from tests.kernels.support import DTYPES, assert_within_budget, poisoned, program_orders, random

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")

from dia_kernels.autograd import gradients as kernels
from tests.helpers.tolerance import assert_as_good_as, exponential_bound, nudged

EPS = 1e-5
SHAPES = settings(max_examples=10, deadline=None)


def labels_of(rows: int, channels: int, vocab: int, device: torch.device, seed: int = 0) -> Tensor:
    """A third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (rows, channels), generator=generator)
    labels[torch.rand(rows, channels, generator=generator) < 0.3] = -100
    return labels.to(device)


def tables(positions: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = random((positions, half), torch.float32, device, 11, 3.0)
    return angles.cos(), angles.sin()


def functions(ops: ModuleType, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Every differentiable function with small arguments that require gradients."""

    def leaf(*shape: int, seed: int) -> Tensor:
        return random(shape, dtype, device, seed).requires_grad_(True)

    cos, sin = tables(7, 4, device)
    places = torch.tensor([3, 0, 6], dtype=torch.int32, device=device)
    labels = labels_of(5, 2, 7, device)
    weights = torch.tensor([1.0, 0.5], device=device)
    return {
        "rms_norm": (
            lambda x, w: differentiable.rms_norm(x, w, EPS, ops), (leaf(3, 20, seed=1), leaf(20, seed=2)),
        ),
        "rope": (lambda x: differentiable.rope(x, cos, sin, places, 1, ops), (leaf(3, 4 * 8, seed=3),)),
        "glu": (lambda x: differentiable.glu(x, ops), (leaf(3, 10, seed=4),)),
        "linear_cross_entropy": (
            lambda x, w: differentiable.linear_cross_entropy(x, w, labels, weights, ops, chunk_rows=2)[0],
            (leaf(5, 6, seed=5), leaf(14, 6, seed=6)),
        ),
    }  # fmt: skip


NAMES = ("rms_norm", "rope", "glu", "linear_cross_entropy")


class Again(torch.autograd.Function):
    """A function whose backward runs all of it anew: gradcheck goes back many times, `linear_cross_entropy` once."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*arguments)
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [tensor.detach().requires_grad_(True) for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*leaves), leaves, grad)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_reference(name: str) -> None:
    function, arguments = functions(reference, torch.float64, torch.device("cpu"))[name]
    assert torch.autograd.gradcheck(lambda *given: Again.apply(function, *given), arguments)


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["along one line", "whole"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck would rather have fp64
def test_gradcheck_of_the_kernels(name: str, fast: bool, device: torch.device) -> None:
    """In fp32: steps of 1/64 leave errors of some 1e-4 by curvature and 1e-5 by rounding."""
    function, arguments = functions(kernels, torch.float32, device)[name]
    assert torch.autograd.gradcheck(
        lambda *given: Again.apply(function, *given), arguments, eps=1 / 64, atol=2e-3, rtol=2e-3, fast_mode=fast
    )


def near(actual: Tensor, plain: Tensor, exact: Tensor, magnitude: float) -> None:
    """For odd shapes, which look for wrong places: a few values make no statistics of errors.

    magnitude: what rounding errors are relative to, the largest term of the sums; 32 of them may add up.
    """
    allowed = torch.finfo(actual.dtype).eps * exact.abs() + 32 * 2.0**-24 * magnitude
    worst = ((actual.double() - exact).abs() / allowed).max().item()
    assert worst <= 1, f"{worst:.1f} times the error that is allowed"


def judged(actual: Tensor, plain: Tensor, exact: Tensor, magnitude: float | None) -> None:
    if magnitude is None:
        assert_within_budget(actual, plain, exact)
    else:
        near(actual, plain, exact, magnitude)


def check_rms_norm(
    rows: int, hidden: int, dtype: torch.dtype, device: torch.device, weight_dtype: Any = None, odd: bool = False
) -> None:
    x, grad = random((rows, hidden), dtype, device, 1, 2.0), random((rows, hidden), dtype, device, 2)
    weight = random((hidden,), weight_dtype or dtype, device, 3)
    results = []
    for ops, args in (
        (kernels, (x, weight, grad)), (reference, (x, weight, grad)),
        (reference, (x.double(), weight.double(), grad.double())),
    ):  # fmt: skip
        dx, dweight = poisoned(x.shape, args[0].dtype, device), poisoned((hidden,), args[1].dtype, device)
        ops.rms_norm_backward(args[0], args[1], EPS, args[2], dx, dweight)
        results.append((dx, dweight))
    inverse = float((x.double().square().mean(-1) + EPS).rsqrt().max())
    terms = float((grad.double() * weight).abs().max()) * inverse * hidden, float(grad.abs().max()) * hidden**0.5 * rows
    for got, plain, exact, magnitude in zip(*results, terms, strict=True):
        judged(got, plain, exact, magnitude if odd else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 17, 63])
def test_rms_norm_backward(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    check_rms_norm(rows, 80, dtype, device)


def test_rms_norm_backward_with_wide_weights_at_production_width(device: torch.device) -> None:
    check_rms_norm(3, 2048, torch.bfloat16, device, torch.float32)


def test_a_frozen_norm_has_no_gradient(device: torch.device) -> None:
    x, grad, weight = (random(shape, torch.float32, device, i) for i, shape in enumerate(((5, 32), (5, 32), (32,))))
    alone = kernels.rms_norm_backward(x, weight, EPS, grad, poisoned((5, 32), torch.float32, device))
    both = poisoned((5, 32), torch.float32, device)
    kernels.rms_norm_backward(x, weight, EPS, grad, both, poisoned((32,), torch.float32, device))
    assert torch.equal(alone, both)


def check_rotate(
    tokens: int, heads: int, kv_heads: int, half: int, dtype: torch.dtype, device: torch.device, odd: bool = False
) -> None:
    qkv = random((tokens, (heads + 2 * kv_heads) * 2 * half), dtype, device, 4)
    cos, sin = tables(9, half, device)
    places = torch.arange(tokens, dtype=torch.int32, device=device) % 9
    for inverse in (False, True):
        out = kernels.rotate(qkv, cos, sin, places, kv_heads, poisoned(qkv.shape, dtype, device), inverse=inverse)
        plain = reference.rotate(qkv, cos, sin, places, kv_heads, torch.empty_like(qkv), inverse=inverse)
        exact = reference.rotate(
            qkv.double(), cos.double(), sin.double(), places, kv_heads, torch.empty_like(qkv.double()), inverse=inverse
        )
        judged(out, plain, exact, float(qkv.abs().max()) if odd else None)
        v = slice(-kv_heads * 2 * half, None)
        assert torch.equal(out[:, v], qkv[:, v])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "half"), [(2, 1, 8), (3, 3, 24), (16, 4, 64)])
def test_rotate(heads: int, kv_heads: int, half: int, dtype: torch.dtype, device: torch.device) -> None:
    check_rotate(5, heads, kv_heads, half, dtype, device)


def test_rotate_agrees_with_the_rotation_of_inference(device: torch.device) -> None:
    from dia_kernels.reference import rope

    qkv, (cos, sin) = random((5, 4 * 16), torch.bfloat16, device, 4), tables(9, 8, device)
    places = torch.arange(5, dtype=torch.int32, device=device)
    out = reference.rotate(qkv, cos, sin, places, 1, poisoned(qkv.shape, qkv.dtype, device))
    assert torch.equal(out, rope(qkv.clone(), cos, sin, places, 1))


def test_infinite_values_stay_what_they_are(device: torch.device) -> None:
    qkv = torch.ones(1, 3 * 16, device=device)
    qkv[0, 2 * 16] = torch.inf
    cos, sin = tables(1, 8, device)
    place = torch.zeros(1, dtype=torch.int32, device=device)
    out = kernels.rotate(qkv, cos, sin, place, 1, poisoned(qkv.shape, torch.float32, device))
    assert torch.equal(out[:, 32:], qkv[:, 32:]) and out[:, :32].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 100), (17, 63), (2, 8192)])
def test_glu_backward(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, grad = random((rows, 2 * width), dtype, device, 5, 3.0), random((rows, width), dtype, device, 6)
    out = kernels.glu_backward(x, grad, poisoned(x.shape, dtype, device))
    plain = reference.glu_backward(x, grad, torch.empty_like(x))
    wide = x.double()
    assert_within_budget(out, plain, reference.glu_backward(wide, grad.double(), torch.empty_like(wide)))


def test_glu_backward_of_extreme_gates(device: torch.device) -> None:
    gates = torch.tensor([[-1e4, -100.0, -90.0, 0.0, 90.0, 1e4]], device=device)
    x = torch.cat((gates, torch.full_like(gates, 2.0)), 1)
    out = kernels.glu_backward(x, torch.ones_like(gates), poisoned(x.shape, torch.float32, device))
    wide = x.double()
    exact = reference.glu_backward(wide, torch.ones_like(gates).double(), torch.empty_like(wide))
    # A sigmoid below the smallest normal number may be taken for 0; it is multiplied by up and by the gate.
    tiny = 2 * 100 * torch.finfo(torch.float32).tiny
    torch.testing.assert_close(out.double(), exact, rtol=exponential_bound(100), atol=tiny)


def check_cross_entropy(
    rows: int,
    channels: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 3.0,
    odd: bool = False,
) -> None:
    logits = random((rows, channels, vocab), dtype, device, 7, scale)
    labels, weights = labels_of(rows, channels, vocab, device), random((channels,), torch.float32, device, 8).abs()
    results = []
    for ops, kind in ((kernels, dtype), (reference, dtype), (reference, torch.float64)):
        values = logits.to(kind, copy=True)
        wide = torch.float64 if kind == torch.float64 else torch.float32
        losses = poisoned((rows, channels), wide, device)
        assert ops.cross_entropy(values, labels, weights, losses, gradient=True) is losses
        results.append((losses, values))
    for got, plain, exact in zip(*results, strict=True):
        judged(got, plain, exact, float(logits.abs().max()) + float(weights.max()) + 1 if odd else None)
    ignored = labels < 0
    assert not results[0][0][ignored].any() and not results[0][1][ignored].any()
    untouched, losses = logits.clone(), poisoned((rows, channels), torch.float32, device)
    kernels.cross_entropy(untouched, labels, weights, losses, gradient=False)
    assert torch.equal(untouched, logits) and torch.equal(losses, results[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels", "vocab"), [(40, 1, 3), (5, 2, 17), (3, 9, 1028)])
def test_cross_entropy(rows: int, channels: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    check_cross_entropy(rows, channels, vocab, dtype, device)


@SHAPES
@given(
    rows=st.integers(1, 6),
    channels=st.integers(1, 4),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 3.0, 60.0]),
)
def test_cross_entropy_shapes(rows: int, channels: int, vocab: int, dtype: torch.dtype, scale: float) -> None:
    check_cross_entropy(rows, channels, vocab, dtype, executor.device(), scale, odd=True)


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 20), hidden=st.integers(2, 90), dtype=st.sampled_from(DTYPES))
def test_rms_norm_backward_shapes(rows: int, hidden: int, dtype: torch.dtype) -> None:
    check_rms_norm(rows, hidden, dtype, executor.device(), odd=True)


@SHAPES
@given(
    tokens=st.integers(1, 5), heads=st.integers(1, 9), kv_heads=st.integers(1, 4), half=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_rotate_shapes(tokens: int, heads: int, kv_heads: int, half: int, dtype: torch.dtype) -> None:
    check_rotate(tokens, heads, kv_heads, half, dtype, executor.device(), odd=True)


def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    x, grad, weight = (random(shape, torch.bfloat16, device, 9) for shape in ((40, 48), (40, 48), (48,)))
    logits, labels = random((6, 3, 20), torch.bfloat16, device, 10), labels_of(6, 3, 20, device)
    found = []
    for order in program_orders():
        dx, dweight, values = poisoned(x.shape, x.dtype, device), poisoned((48,), x.dtype, device), logits.clone()
        losses = poisoned((6, 3), torch.float32, device)
        with order:
            kernels.rms_norm_backward(x, weight, EPS, grad, dx, dweight)
            kernels.cross_entropy(values, labels, torch.ones(3, device=device), losses, gradient=True)
        found.append((dx, dweight, values, losses))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("ops", [reference, kernels], ids=["torch", "triton"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 8, 100])
def test_chunks_make_no_difference(ops: ModuleType, chunk_rows: int, device: torch.device) -> None:
    x, weight = random((8, 24), torch.float32, device, 1), random((3 * 11, 24), torch.float32, device, 2, 0.3)
    labels, weights = labels_of(8, 3, 11, device), torch.tensor([1.0, 2.0, 0.0], device=device)
    leaves = [x.clone().requires_grad_(True), weight.clone().requires_grad_(True)]
    total, losses = differentiable.linear_cross_entropy(*leaves, labels, weights, ops, chunk_rows)
    (total * 0.25).backward()

    def plain(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        given = [x.detach().requires_grad_(True), weight.detach().requires_grad_(True)]
        logits = (given[0] @ given[1].T).view(8, 3, 11)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(8, 3)
        total = (each * weights.to(x.dtype)).sum()
        return [each.sum(0).detach(), total.detach(), *torch.autograd.grad(total * 0.25, given)]

    exact = plain(x.double(), weight.double())
    moved = [plain(nudged(x, n), nudged(weight, 100 + n)) for n in range(1, 8)]
    ours = [losses, total, leaves[0].grad, leaves[1].grad]
    for found, name, wide, *others in zip(
        ours, ("losses", "total", "x", "weight"), exact, plain(x, weight), *moved, strict=True
    ):
        assert found is not None
        assert_as_good_as(found, others, wide, name)


def test_bf16_gradients_are_scaled_in_fp32(device: torch.device) -> None:
    """1/3 in bf16 is 0.2 % off, for all of them in the same direction."""
    x = random((600, 8), torch.bfloat16, device, 1).requires_grad_(True)
    weight, labels = random((6, 8), torch.float32, device, 2), labels_of(600, 2, 3, device)
    total, _ = differentiable.linear_cross_entropy(x, weight, labels, torch.ones(2, device=device), reference)
    [whole] = torch.autograd.grad(total, x, retain_graph=True)
    total, _ = differentiable.linear_cross_entropy(x, weight, labels, torch.ones(2, device=device), reference)
    [third] = torch.autograd.grad(total / 3, x)
    assert torch.equal(third, (whole.float() / 3).bfloat16())


def test_a_second_backward_is_refused(device: torch.device) -> None:
    function, arguments = functions(reference, torch.float32, device)["linear_cross_entropy"]
    total = function(*arguments)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs only once"):
        total.backward()


def wrong_calls() -> dict[str, tuple[Callable[[], Any], str]]:
    x, flat, labels = torch.ones(2, 4), torch.ones(4), torch.zeros(2, 2, dtype=torch.int64)
    places, table = torch.zeros(2, dtype=torch.int32), torch.ones(1, 2)
    logits, two = torch.ones(2, 2, 3), torch.ones(2)
    return {
        "norm weight": (lambda: kernels.rms_norm_backward(x, torch.ones(3), EPS, x, x), "weight: shape"),
        "norm grad": (lambda: kernels.rms_norm_backward(x, flat, EPS, torch.ones(4, 2).T, x), "grad: has strides"),
        "norm dweight": (lambda: kernels.rms_norm_backward(x, flat, EPS, x, x, torch.ones(5)), "dweight: shape"),
        "glu": (lambda: kernels.glu_backward(x, torch.ones(2, 3), x), "x: shape"),
        "rotate width": (lambda: kernels.rotate(x, table, table, places, 1, x), "qkv: 4 columns, needs"),
        "rotate places": (
            lambda: kernels.rotate(torch.ones(2, 12), table, table, places.long(), 1, torch.ones(2, 12)), "positions: ",
        ),
        "labels": (
            lambda: kernels.cross_entropy(logits, labels.int(), two, torch.ones(2, 2), gradient=True),
            "labels, weights, losses: torch.int32",
        ),
        "losses": (
            lambda: kernels.cross_entropy(logits, labels, two, torch.ones(2, 3), gradient=True), "losses: shape",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", wrong_calls())
def test_wrong_arguments_are_named(name: str) -> None:
    call, message = wrong_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_choice_of_ops() -> None:
    assert differentiable.gradient_ops("torch") is differentiable.gradient_ops() is reference
    assert set(kernels.__all__) <= set(dir(reference)) and kernels.name == "triton"
