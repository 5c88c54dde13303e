"""rms_norm_linear, linear_residual, rms_norm_glu and codebook_logits against fp64 and the torch reference."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_kernels import reference
from dia_kernels.triton import gemv
from dia_kernels.triton.codebook_logits import codebook_logits
from dia_kernels.triton.linear_residual import linear_residual
from dia_kernels.triton.rms_norm_glu import rms_norm_glu
from dia_kernels.triton.rms_norm_linear import rms_norm_linear
from tests.kernels import executor
from tests.kernels.support import DTYPES, assert_untouched, assert_within_budget, poisoned, random

EPS = 1e-5


class Inputs(NamedTuple):
    x: Tensor
    norm: Tensor
    weight: Tensor
    residual: Tensor
    constant: Tensor


def make(rows: int, hidden: int, features: int, dtype: torch.dtype, extra: int = 0, scale: float = 1.0) -> Inputs:
    """Activations, weights of a width that keeps results near 1, and a residual with `extra` rows more than x."""
    device = executor.device()
    return Inputs(
        random((rows, hidden), dtype, device, 1, scale),
        random((hidden,), dtype, device, 2) + 1,
        random((features, hidden), dtype, device, 3, hidden**-0.5),
        random((rows + extra, features), dtype, device, 4),
        random((features,), dtype, device, 5),
    )


def exact_norm(x: Tensor, norm: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()


def run_linear(i: Inputs, ops) -> Tensor:
    out = poisoned((i.x.shape[0], i.weight.shape[0]), i.x.dtype, i.x.device)
    return ops.rms_norm_linear(i.x, i.norm, i.weight, EPS, out)


def run_residual(i: Inputs, ops) -> Tensor:
    return ops.linear_residual(i.x, i.weight, i.residual.clone(), i.constant if len(i.residual) > len(i.x) else None)


def run_glu(i: Inputs, ops) -> Tensor:
    out = poisoned((i.x.shape[0], i.weight.shape[0] // 2), i.x.dtype, i.x.device)
    return ops.rms_norm_glu(i.x, i.norm, i.weight, EPS, out)


def run_logits(i: Inputs, ops) -> Tensor:
    out = poisoned((i.x.shape[0], 2, i.weight.shape[0] // 2), torch.float32, i.x.device)
    return ops.codebook_logits(i.x, i.norm, i.weight, EPS, out)


def exact_linear(i: Inputs) -> Tensor:
    return exact_norm(i.x, i.norm) @ i.weight.double().T


def exact_residual(i: Inputs) -> Tensor:
    added = i.constant.double().expand(len(i.residual), -1).clone()
    added[: len(i.x)] = i.x.double() @ i.weight.double().T
    return i.residual.double() + added


def exact_glu(i: Inputs) -> Tensor:
    gate, up = exact_linear(i).chunk(2, -1)
    return F.silu(gate) * up


def exact_logits(i: Inputs) -> Tensor:
    return exact_linear(i).view(i.x.shape[0], 2, -1)


class Kernels:
    rms_norm_linear = staticmethod(rms_norm_linear)
    linear_residual = staticmethod(linear_residual)
    rms_norm_glu = staticmethod(rms_norm_glu)
    codebook_logits = staticmethod(codebook_logits)


OPS: dict[str, tuple[Callable[..., Tensor], Callable[[Inputs], Tensor]]] = {
    "rms_norm_linear": (run_linear, exact_linear),
    "linear_residual": (run_residual, exact_residual),
    "rms_norm_glu": (run_glu, exact_glu),
    "codebook_logits": (run_logits, exact_logits),
}
each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def unluckiest(op: str, inputs: Inputs, exact: Tensor) -> Tensor:
    """The worst of eight results of plain torch, which differ in the order of the columns: a sum's rounding is luck."""
    run, worst, largest = OPS[op][0], None, -1.0
    for seed in range(8):
        order = torch.randperm(inputs.x.shape[1], generator=torch.Generator().manual_seed(seed)).to(inputs.x.device)
        shuffled = inputs._replace(x=inputs.x[:, order], norm=inputs.norm[order], weight=inputs.weight[:, order])
        result = run(shuffled, reference).to(inputs.x.dtype)  # logits are float32 but hold values of the dtype
        error = (result.double() - exact).abs().max().item()
        if error > largest:
            worst, largest = result, error
    assert worst is not None
    return worst


def check(op: str, inputs: Inputs) -> None:
    run, exact = OPS[op]
    expected = exact(inputs)
    assert_within_budget(run(inputs, Kernels).to(inputs.x.dtype), unluckiest(op, inputs, expected), expected)


@each_op
@each_dtype
@pytest.mark.parametrize(("rows", "hidden", "features"), [(1, 32, 34), (3, 80, 16), (17, 528, 18), (63, 96, 2)])
def test_against_fp64(op: str, dtype: torch.dtype, rows: int, hidden: int, features: int) -> None:
    check(op, make(rows, hidden, features, dtype, extra=3))


@each_op
@pytest.mark.parametrize("hidden", [2064, 4608])
def test_more_steps_than_are_in_flight(op: str, hidden: int) -> None:
    check(op, make(2, hidden, 8, torch.bfloat16))


@pytest.mark.production
@pytest.mark.parametrize(
    ("op", "hidden", "features"),
    [
        ("rms_norm_linear", 2048, 3072),
        ("linear_residual", 8192, 2048),
        ("rms_norm_glu", 2048, 16384),
        ("codebook_logits", 2048, 9252),
    ],
)
def test_production_width(op: str, hidden: int, features: int) -> None:
    """Exact widths of Dia-1.6B; the interpreter takes a slice of the features that ends with a partial block."""
    check(op, make(2, hidden, 132 if executor.interpreted() else features, torch.bfloat16))


@settings(max_examples=12, deadline=None)
@given(
    op=st.sampled_from(sorted(OPS)),
    rows=st.integers(1, 64),
    sixteenths=st.integers(1, 40),
    pairs=st.integers(1, 20),
    extra=st.integers(0, 64),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-2, 1.0, 100.0]),
)
def test_any_shape(
    op: str, rows: int, sixteenths: int, pairs: int, extra: int, dtype: torch.dtype, scale: float
) -> None:
    inputs = make(rows, 16 * sixteenths, 2 * pairs, dtype, min(extra, 64 - rows), scale)
    check(op, inputs._replace(weight=inputs.weight / scale if op == "linear_residual" else inputs.weight))


@each_op
@each_dtype
def test_rows_do_not_depend_on_each_other(op: str, dtype: torch.dtype) -> None:
    inputs = make(64, 528, 18, dtype)
    run = OPS[op][0]
    whole = run(inputs, Kernels)
    for first, last in ((0, 1), (5, 6), (40, 47), (3, 11), (10, 19), (8, 24), (20, 52), (1, 64)):
        part = inputs._replace(x=inputs.x[first:last], residual=inputs.residual[first:last])
        assert torch.equal(run(part, Kernels), whole[first:last]), (
            f"rows {first} to {last} differ from the same rows of 64"
        )


@pytest.mark.slow
@each_op
@each_dtype
def test_every_number_of_rows_gives_the_same_bits(op: str, dtype: torch.dtype) -> None:
    inputs = make(64, 1040, 34, dtype)
    run = OPS[op][0]
    whole = run(inputs, Kernels)
    for rows in range(1, 65):
        part = inputs._replace(x=inputs.x[:rows], residual=inputs.residual[:rows])
        assert torch.equal(run(part, Kernels), whole[:rows]), f"{rows} rows"


@each_op
def test_a_row_of_nan_stays_alone(op: str) -> None:
    inputs = make(5, 80, 18, torch.bfloat16)
    run = OPS[op][0]
    clean = run(inputs, Kernels)
    inputs.x[2] = math.nan
    result = run(inputs, Kernels)
    assert result[2].isnan().all()
    assert torch.equal(result[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@each_op
def test_repeats_to_the_bit(op: str) -> None:
    inputs = make(17, 1040, 34, torch.bfloat16)
    run = OPS[op][0]
    first = run(inputs, Kernels)
    assert torch.equal(run(inputs, Kernels), first)


@each_op
def test_writes_only_its_rows(op: str) -> None:
    inputs = make(3, 48, 18, torch.float16)
    run, device = OPS[op][0], executor.device()
    expected = run(inputs, Kernels)
    dtype = torch.float32 if op == "codebook_logits" else torch.float16
    frame = poisoned((5, *expected.shape[1:]), dtype, device)
    frame = torch.cat(
        (frame.flatten(), poisoned((64,), dtype, device))
    )  # starts 16-byte aligned, ends away from the rows
    inside = frame[64 : 64 + expected.numel()].view(expected.shape)
    if op == "linear_residual":
        linear_residual(inputs.x, inputs.weight, inside.copy_(inputs.residual))
    elif op == "rms_norm_glu":
        rms_norm_glu(inputs.x, inputs.norm, inputs.weight, EPS, inside)
    elif op == "rms_norm_linear":
        rms_norm_linear(inputs.x, inputs.norm, inputs.weight, EPS, inside)
    else:
        codebook_logits(inputs.x, inputs.norm, inputs.weight, EPS, inside)
    assert torch.equal(inside, expected)
    assert_untouched(frame[:64])
    assert_untouched(frame[64 + expected.numel() :])


def test_logits_hold_values_of_the_dtype() -> None:
    logits = run_logits(make(2, 80, 18, torch.bfloat16), Kernels)
    assert torch.equal(logits, logits.bfloat16().float())


def test_fp16_norm_of_large_activations_does_not_overflow() -> None:
    inputs = make(2, 64, 16, torch.float16)
    inputs = inputs._replace(x=inputs.x * 2000, norm=inputs.norm * 30)
    assert (inputs.x.float() * inputs.norm.float()).abs().max() > 65504
    check("rms_norm_linear", inputs)


def test_residual_is_rounded_once() -> None:
    """The plain sum rounds the product first: on average its error is larger."""
    inputs = make(32, 64, 256, torch.bfloat16)
    exact = exact_residual(inputs)
    ours, plain = (run_residual(inputs, ops).double() - exact for ops in (Kernels, reference))
    assert ours.square().mean() < plain.square().mean()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: i._replace(x=i.x.double()), TypeError, "x: dtype torch.float64"),
        (
            lambda i: i._replace(norm=i.norm.double()),
            TypeError,
            "norm_weight: dtype torch.float64, needs torch.float32",
        ),
        (lambda i: i._replace(x=i.x.repeat(33, 1)), ValueError, "x: 66 rows, one launch takes 1 to 64"),
        (lambda i: i._replace(x=i.x[:0]), ValueError, "x: 0 rows"),
        (lambda i: i._replace(x=i.x[:, :24], norm=i.norm[:24]), ValueError, "x: width 24 is not a multiple of 16"),
        (lambda i: i._replace(norm=i.norm[:16]), ValueError, r"norm_weight: shape \(16,\), expected \(32,\)"),
        (
            lambda i: i._replace(weight=i.weight.T.contiguous().T),
            ValueError,
            r"weight: has strides \(1, 18\), must be contiguous",
        ),
        (
            lambda i: i._replace(weight=i.weight.new_zeros(577)[1:].view(18, 32)),
            ValueError,
            "weight: starts at an address",
        ),
    ],
)
def test_wrong_arguments_are_named(change: Callable[[Inputs], Inputs], error: type, message: str) -> None:
    inputs = change(make(2, 32, 18, torch.float32))
    with pytest.raises(error, match=message):
        run_linear(inputs, Kernels)


@pytest.mark.parametrize("op", ["rms_norm_linear", "rms_norm_glu"])
def test_results_are_of_the_dtype_of_x(op: str) -> None:
    i = make(2, 32, 18, torch.bfloat16)
    out = poisoned((2, 18 if op == "rms_norm_linear" else 9), torch.float32, i.x.device)
    with pytest.raises(TypeError, match="out: dtype torch.float32, needs torch.bfloat16 beside x of torch.bfloat16"):
        getattr(Kernels, op)(i.x, i.norm, i.weight, EPS, out)


def test_logits_are_float32() -> None:
    i = make(2, 32, 18, torch.bfloat16)
    with pytest.raises(TypeError, match="out: dtype torch.bfloat16, needs torch.float32 beside x of torch.bfloat16"):
        codebook_logits(i.x, i.norm, i.weight, EPS, poisoned((2, 2, 9), torch.bfloat16, i.x.device))


def test_rows_without_input_need_a_constant() -> None:
    inputs = make(2, 32, 18, torch.float32, extra=1)
    with pytest.raises(ValueError, match="constant: needed, residual has 3 rows and x only 2"):
        linear_residual(inputs.x, inputs.weight, inputs.residual)
    with pytest.raises(ValueError, match="residual: 1 rows, x has 2"):
        linear_residual(inputs.x, inputs.weight, inputs.residual[:1])


@each_op
@each_dtype
def test_rows_may_be_shared_among_programs(
    op: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row has the same bits, and rows without input their constant once, however many programs share the rows."""
    inputs = make(37, 48, 18, dtype, extra=5)
    run = OPS[op][0]
    expected = run(inputs, Kernels)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({op: [{"use": {"BLOCK_R": 16}}]}))
    monkeypatch.setenv("DIA_KERNELS_TABLE", str(table))
    assert torch.equal(run(inputs, Kernels), expected)


@each_op
@each_dtype
def test_how_much_of_x_is_read_at_once_changes_no_bit(
    op: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are fewer steps than that, as many or more; the last step is not full."""
    inputs = make(3, 5 * 256 + 64, 18, dtype, extra=1)
    run = OPS[op][0]
    expected = run(inputs, Kernels)
    for ahead in (0, 1, 3, 16):
        table = tmp_path / f"{ahead}.json"
        table.write_text(json.dumps({op: [{"use": {"X_AHEAD": ahead}}]}))
        monkeypatch.setenv("DIA_KERNELS_TABLE", str(table))
        assert torch.equal(run(inputs, Kernels), expected)


@each_op
@each_dtype
def test_tiles_that_come_through_shared_memory_change_no_bit(
    op: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(19, 2 * 256 + 48, 18, dtype, extra=1)
    run = OPS[op][0]
    expected = run(inputs, Kernels)
    for stages, features in ((1, 16), (3, 32)):
        table = tmp_path / f"{stages}.json"
        table.write_text(json.dumps({op: [{"use": {"STAGES": stages, "BLOCK_N": features}}]}))
        monkeypatch.setenv("DIA_KERNELS_TABLE", str(table))
        assert torch.equal(run(inputs, Kernels), expected)


@pytest.mark.parametrize("arch", ["interpreter", "sm_80", "sm_90", "sm_120", "gfx942", "gfx950", "gfx1100"])
@pytest.mark.parametrize(
    ("op", "features", "hidden"),
    [
        ("linear_residual", 2048, 2048), ("rms_norm_linear", 2048, 2048), ("rms_norm_linear", 3072, 2048),
        ("linear_residual", 2048, 8192), ("rms_norm_glu", 16384, 2048), ("codebook_logits", 9252, 2048),
    ],
)  # fmt: skip
@each_dtype
def test_order_of_accumulation_does_not_depend_on_the_rows(
    arch: str, op: str, features: int, hidden: int, dtype: torch.dtype
) -> None:
    """The constants that fix a row's bits are the same for every number of rows; the others may follow it."""
    free = {"BLOCK_R", "BLOCK_N", "DEPTH", "X_AHEAD", "STAGES"}
    fixed = set()
    for rows in range(1, 65):
        config = gemv.default_config(op, dtype, arch, rows=rows, features=features, hidden=hidden)
        assert config["BLOCK_R"] >= min(rows, 32)
        assert config["num_warps"] == config["SPLIT_K"]
        fixed.add(tuple(sorted((key, value) for key, value in config.items() if key not in free)))
    assert len(fixed) == 1
