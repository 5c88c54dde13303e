"""The projections by weights in 8 bits: against fp64, the torch reference, and themselves with other rows."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_kernels import reference
from dia_kernels.reference import PackedWeight
from dia_kernels.reference.quantized import Int8Weight, quantize
from dia_kernels.triton import gemv
from tests.kernels import executor
from tests.kernels.support import DTYPES, assert_within_budget
from tests.kernels.test_linear import OPS, Inputs, Kernels, make

each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class RoundedActivations(PackedWeight):
    """The reference on activations that were rounded to a dtype first, columns in another order."""

    def __init__(self, weight: Int8Weight, dtype: torch.dtype, order: Tensor) -> None:
        self.weight, self.dtype, self.shape = weight, dtype, weight.shape
        self.order = order

    def linear(self, x: Tensor) -> Tensor:
        shuffled = Int8Weight(self.weight.values[:, self.order], self.weight.scales)
        return shuffled.linear(x.to(self.dtype)[:, self.order])


def make_int8(rows: int, hidden: int, features: int, dtype: torch.dtype, extra: int = 0, scale: float = 1.0) -> Inputs:
    """As `make`, the weights in 8 bits: scales differ by channel, and one row of the weights is 0."""
    inputs = make(rows, hidden, features, dtype, extra, scale)
    spread = torch.linspace(0.25, 2, features, dtype=torch.float32, device=inputs.weight.device)
    weight = inputs.weight.float() * spread[:, None]
    weight[features // 2] = 0
    return inputs._replace(weight=quantize(weight))


def check(op: str, inputs: Inputs) -> None:
    """Hold a kernel to twice the error of rounding the activations once, and one rounding of the result."""
    run, exact = OPS[op]
    weight, dtype = inputs.weight, inputs.x.dtype
    expected = exact(inputs._replace(weight=weight.values.double() * weight.scales.double()[:, None]))
    worst, largest = None, -1.0
    for seed in range(8):
        order = torch.randperm(inputs.x.shape[1], generator=torch.Generator().manual_seed(seed)).to(inputs.x.device)
        plain = run(inputs._replace(weight=RoundedActivations(weight, dtype, order)), reference).to(dtype)
        if (error := (plain.double() - expected).abs().max().item()) > largest:
            worst, largest = plain, error
    assert_within_budget(run(inputs, Kernels).to(dtype), worst, expected)


@each_op
@each_dtype
@pytest.mark.parametrize(("rows", "hidden", "features"), [(1, 32, 34), (3, 80, 16), (17, 528, 18), (63, 96, 2)])
def test_against_fp64(op: str, dtype: torch.dtype, rows: int, hidden: int, features: int) -> None:
    check(op, make_int8(rows, hidden, features, dtype, extra=3))


@each_op
def test_more_steps_than_are_in_flight(op: str) -> None:
    check(op, make_int8(2, 4608, 8, torch.bfloat16))


@settings(max_examples=8, deadline=None)
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
    inputs = make_int8(rows, 16 * sixteenths, 2 * pairs, dtype, min(extra, 64 - rows), scale)
    if op == "linear_residual":
        inputs = inputs._replace(weight=Int8Weight(inputs.weight.values, inputs.weight.scales / scale))
    check(op, inputs)


@each_op
@each_dtype
def test_rows_do_not_depend_on_each_other(op: str, dtype: torch.dtype) -> None:
    inputs = make_int8(64, 528, 18, dtype)
    run = OPS[op][0]
    whole = run(inputs, Kernels)
    for first, last in ((0, 1), (5, 6), (3, 11), (10, 19), (20, 52), (1, 64)):
        part = inputs._replace(x=inputs.x[first:last], residual=inputs.residual[first:last])
        assert torch.equal(run(part, Kernels), whole[first:last]), (
            f"rows {first} to {last} differ from the same rows of 64"
        )


@each_dtype
def test_every_value_is_widened_exactly(dtype: torch.dtype) -> None:
    inputs = make_int8(1, 16, 255, dtype)
    values = torch.zeros(255, 16, dtype=torch.int8, device=inputs.x.device)
    values[:, 5] = torch.arange(-127, 128).to(values)
    x, residual = torch.zeros_like(inputs.x), torch.zeros_like(inputs.residual)
    x[0, 5] = 1.0
    scales = torch.full((255,), 0.5, dtype=torch.float32, device=inputs.x.device)
    result = OPS["linear_residual"][0](
        inputs._replace(x=x, residual=residual, weight=Int8Weight(values, scales)), Kernels
    )
    assert torch.equal(result[0].float(), values[:, 5].float() * 0.5)


@each_op
def test_a_row_of_nan_stays_alone(op: str) -> None:
    inputs = make_int8(5, 80, 18, torch.bfloat16)
    run = OPS[op][0]
    clean = run(inputs, Kernels)
    inputs.x[2] = math.nan
    result = run(inputs, Kernels)
    assert result[2].isnan().all()
    assert torch.equal(result[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@each_op
def test_how_the_work_is_cut_changes_no_bit(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_int8(19, 5 * 256 + 64, 34, torch.bfloat16, extra=1)
    run = OPS[op][0]
    expected = run(inputs, Kernels)
    for number, use in enumerate(({"X_AHEAD": 3}, {"BLOCK_R": 8, "DEPTH": 1}, {"BLOCK_N": 32})):
        table = tmp_path / f"{number}.json"
        table.write_text(json.dumps({op: [{"where": {"weight_bits": 8}, "use": use}]}))
        monkeypatch.setenv("DIA_KERNELS_TABLE", str(table))
        assert torch.equal(run(inputs, Kernels), expected)


def test_wrong_weights_are_named() -> None:
    inputs = make_int8(2, 32, 18, torch.bfloat16)
    run, weight = OPS["rms_norm_linear"][0], inputs.weight
    for wrong, error, message in (
        (Int8Weight(weight.values.to(torch.int16), weight.scales), TypeError, "weight: dtype torch.int16, needs"),
        (Int8Weight(weight.values, weight.scales.half()), TypeError, "scales of weight: dtype torch.float16, needs"),
        (Int8Weight(weight.values, weight.scales[:3]), ValueError, r"scales of weight: shape \(3,\), expected \(18,\)"),
        (RoundedActivations(weight, torch.half, torch.arange(32)), TypeError, "weight: .* is laid out for a CPU"),
    ):
        with pytest.raises(error, match=message):
            run(inputs._replace(weight=wrong), Kernels)


@pytest.mark.parametrize("arch", ["interpreter", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100"])
@pytest.mark.parametrize("hidden", [2048, 8192])
@pytest.mark.parametrize("op", OPS)
@each_dtype
def test_order_of_accumulation_does_not_depend_on_the_rows(arch: str, op: str, dtype: torch.dtype, hidden: int) -> None:
    free = {"BLOCK_R", "BLOCK_N", "DEPTH", "X_AHEAD", "STAGES"}
    fixed = set()
    for rows in range(1, 65):
        config = gemv.default_config(op, dtype, arch, rows=rows, features=2048, hidden=hidden, weight_bits=8)
        assert config["VECTOR"] == 16
        assert config["num_warps"] == config["SPLIT_K"]
        fixed.add(tuple(sorted((key, value) for key, value in config.items() if key not in free)))
    assert len(fixed) == 1


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
    check(op, make_int8(2, hidden, 132 if executor.interpreted() else features, torch.bfloat16))
