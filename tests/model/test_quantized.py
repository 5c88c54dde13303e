"""Weights in 8 bits: what rounding does to them, what comes out of their products, and models that hold them."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_fast import Dia
from dia_fast.engine import generate
from dia_fast.errors import InputError
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import INT8, INT8_MLP, quantized_names
from dia_kernels import get_ops, reference
from dia_kernels.reference import packed
from dia_kernels.reference.packed import FbgemmInt8
from dia_kernels.reference.quantized import Int8Weight, quantize
from tests.engine.test_engine import CONFIG, random_model, random_request
from tests.kernels.support import poisoned, random

CPU = torch.device("cpu")
EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FBGEMM = pytest.param(
    packed.FbgemmInt8,
    marks=pytest.mark.skipif(
        not packed.runs_here("fbgemm-int8"), reason="FBGEMM needs an x86 processor with AVX2 and a torch built with it"
    ),
    id="fbgemm-int8",
)
each_product = pytest.mark.parametrize("product", [pytest.param(lambda weight: weight, id="reference"), FBGEMM])


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    top=st.integers(-100, 100),
    seed=st.integers(0, 99),
)
def test_every_value_is_rounded_to_the_nearest_of_its_channel(
    dtype: torch.dtype, rows: int, columns: int, top: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = max(min(top, 12), -10) if dtype is torch.float16 else top
    weight = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 2.0**top).to(dtype)
    weight[seed % rows] = 0
    result = quantize(weight)
    scales, exact = result.scales.double(), weight.double()
    assert result.values.dtype is torch.int8 and result.values.abs().max() <= 127
    assert torch.equal(result.scales[weight.any(1)], weight.float().abs().amax(1)[weight.any(1)] / 127)
    # Half a step, and the error of a division in float32.
    assert ((exact - result.values.double() * scales[:, None]).abs() <= scales[:, None] * (0.5 + 127 * 2**-23)).all()
    assert not result.unpack()[seed % rows].any() and (scales > 0).all()


def test_a_matrix_is_not_changed_by_rounding_it_and_rounded_once() -> None:
    weight = random((30, 50), torch.float32, CPU, 1)
    before = weight.clone()
    once = quantize(weight)
    assert torch.equal(weight, before)
    again = quantize(once.unpack())
    assert torch.equal(again.values, once.values)


@each_dtype
@each_product
def test_products_are_those_of_the_rounded_matrix(product: type[FbgemmInt8], dtype: torch.dtype) -> None:
    """The error is that of a float32 sum, or of two bytes of activations: half a step of each of `hidden` numbers."""
    for seed, (rows, hidden, features) in enumerate([(1, 1, 1), (3, 40, 34), (5, 1100, 18), (130, 64, 7)]):
        x, weight = random((rows, hidden), dtype, CPU, seed), quantize(random((features, hidden), dtype, CPU, 9))
        result = product(weight).linear(x)
        assert result.dtype is torch.float32 and result.shape == (rows, features)
        exact = x.double() @ (weight.values.double() * weight.scales.double()[:, None]).T
        absolute = weight.values.double().abs().sum(1) * weight.scales.double()
        largest = x.double().abs().amax(1, keepdim=True)
        summed = hidden * 2**-24 * (x.double().abs() @ (weight.values.double().abs() * weight.scales[:, None]).T)
        allowed = largest * absolute * (2**-14 + 2**-22) + summed if product is FbgemmInt8 else 2 * summed
        assert ((result - exact).abs() <= allowed + 4 * 2**-24 * exact.abs()).all()


@each_product
def test_the_matrix_can_be_read_back(product: type[FbgemmInt8]) -> None:
    weight = quantize(random((33, 70), torch.bfloat16, CPU, 1))
    assert torch.equal(product(weight).unpack(), weight.values.float() * weight.scales[:, None])
    assert product(weight).shape == (33, 70) and product(weight).nbytes == 33 * 70 + 33 * 4


def norm_linear(x: Tensor, weight: reference.PackedWeight) -> Tensor:
    norm = random((x.shape[1],), x.dtype, CPU, 2)
    return reference.rms_norm_linear(x, norm, weight, EPS, poisoned((x.shape[0], weight.shape[0]), x.dtype, CPU))


def gated(x: Tensor, weight: reference.PackedWeight) -> Tensor:
    norm = random((x.shape[1],), x.dtype, CPU, 2)
    return reference.rms_norm_glu(x, norm, weight, EPS, poisoned((x.shape[0], weight.shape[0] // 2), x.dtype, CPU))


def residual(x: Tensor, weight: reference.PackedWeight) -> Tensor:
    return reference.linear_residual(x, weight, torch.ones(x.shape[0], weight.shape[0], dtype=x.dtype))


@each_dtype
@each_product
@pytest.mark.parametrize("op", [norm_linear, gated, residual])
@pytest.mark.parametrize(("hidden", "features"), [(40, 34), (1100, 18)])
def test_every_number_of_rows_gives_the_same_bits(op, product, dtype: torch.dtype, hidden: int, features: int) -> None:
    x, weight = random((130, hidden), dtype, CPU, 1), product(quantize(random((features, hidden), dtype, CPU, 3)))
    alone = torch.cat([op(row[None], weight) for row in x])
    for rows in (*range(1, 34), 64, 127, 130):
        assert torch.equal(op(x[:rows], weight), alone[:rows]), f"{rows} rows"


@each_product
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_alone_and_is_seen(product: type[FbgemmInt8], value: float) -> None:
    x, weight = random((5, 80), torch.bfloat16, CPU, 1), product(quantize(random((18, 80), torch.bfloat16, CPU, 3)))
    clean = weight.linear(x)
    x[2, 7] = value
    result = weight.linear(x)
    assert not result[2].isfinite().any() and torch.equal(result[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@each_product
def test_extreme_rows(product: type[FbgemmInt8]) -> None:
    weight = product(quantize(random((18, 80), torch.bfloat16, CPU, 3)))
    x = random((3, 80), torch.float32, CPU, 1)
    x[1] = 0
    result = weight.linear(x)
    assert not result[1].any()
    for power in (-100, 100):
        assert torch.equal(weight.linear(x * 2.0**power), result * 2.0**power)


def in_8_bits(weights: str, dtype: torch.dtype = torch.bfloat16, of: DiaModel | None = None) -> DiaModel:
    """A model, by default a random one, with matrices in 8 bits."""
    tensors = copy.deepcopy((of or random_model(dtype=dtype)).state_dict())
    names = quantized_names(CONFIG, weights)
    return DiaModel(CONFIG, get_ops("torch")).load({n: quantize(w) if n in names else w for n, w in tensors.items()})


def test_names_of_what_is_in_8_bits() -> None:
    shapes = fused_shapes(CONFIG)
    every, mlp = set(quantized_names(CONFIG, INT8)), set(quantized_names(CONFIG, INT8_MLP))
    assert mlp < every and {name.rpartition(".")[2] for name in mlp} == {"gate_up", "down", "head"}
    assert {name for name, shape in shapes.items() if len(shape) == 2} - every == {
        "encoder.embedding",
        "decoder.embedding",
    }
    assert not quantized_names(CONFIG, "float")


@each_dtype
@pytest.mark.parametrize("weights", [INT8, INT8_MLP])
@pytest.mark.parametrize("pack", [True, False])
def test_a_request_gets_the_same_codes_alone_and_in_a_batch(pack: bool, weights: str, dtype: torch.dtype) -> None:
    model = in_8_bits(weights, dtype).pack(pack)
    assert model.packed
    requests = [random_request(seed=seed, guidance_scale=scale) for seed, scale in ((1, 3.0), (2, None), (3, 2.0))]
    for request, together in zip(requests, generate(model, requests), strict=True):
        assert torch.equal(generate(model, [request])[0].delayed_codes, together.delayed_codes)


def test_a_model_computes_what_the_rounded_matrices_say() -> None:
    given = random_model()
    tensors = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    for name in quantized_names(CONFIG, INT8):
        tensors[name] = quantize(tensors[name]).unpack()
    codes = torch.randint(0, 1024, (1, 12, CONFIG.decoder.num_channels))

    def logits(model: DiaModel) -> Tensor:
        return torch.cat([branch.double() for branch in model.forward_logits([[1, 2, 3]], codes)])  # type: ignore[misc]

    def rounded(dtype: torch.dtype) -> Tensor:
        return logits(DiaModel(CONFIG, get_ops("torch")).load({n: t.to(dtype) for n, t in tensors.items()}))

    exact = rounded(torch.float64)
    plain = in_8_bits(INT8, torch.float32, given)
    assert (logits(plain) - exact).abs().max() <= 4 * (rounded(torch.float32) - exact).abs().max()
    # Two bytes of activations keep more than a bfloat16 does.
    assert (logits(plain.pack()) - exact).abs().max() <= (rounded(torch.bfloat16) - exact).abs().max()


def test_a_model_in_8_bits_says_so_when_its_tensors_are_wanted() -> None:
    model = in_8_bits(INT8_MLP)
    for forbidden in (model.state_dict, model.requires_grad_, model.float, model.finalize):
        with pytest.raises(InputError, match="weights='float'"):
            forbidden()
    tensors = dict(random_model(dtype=torch.bfloat16).state_dict())
    name = "decoder.layers.0.qkv"
    with pytest.raises(InputError, match=f"{name} has shape"):
        DiaModel(CONFIG, get_ops("torch")).load(tensors | {name: quantize(torch.ones(3, 5))})
    del tensors["encoder.norm"]
    with pytest.raises(InputError, match="encoder.norm"):
        DiaModel(CONFIG, get_ops("torch")).load(tensors | {name: quantize(tensors[name])})


def test_from_pretrained_rounds_while_it_loads() -> None:
    whole = Dia.from_pretrained("demo", device="cpu", codec=None, weights=INT8, pack=False).model
    assert whole.packed and all(isinstance(layer.qkv, Int8Weight) for layer in whole.decoder.layers)
    part = Dia.from_pretrained("demo", device="cpu", codec=None, weights=INT8_MLP, pack=False).model
    layer = part.decoder.layers[0]
    assert isinstance(layer.down, Int8Weight) and isinstance(layer.qkv, Tensor)
    plain = Dia.from_pretrained("demo", device="cpu", codec=None, pack=False).model
    assert torch.equal(layer.down.values, quantize(plain.decoder.layers[0].down.bfloat16()).values)
    for wrong in ("int4", 8, True, "", "INT8"):
        with pytest.raises(InputError, match="weights .* is unknown; use one of float, int8, int8-mlp"):
            Dia.from_pretrained("demo", device="cpu", codec=None, weights=wrong)  # type: ignore[arg-type]


ONE_COPY = """
from pathlib import Path
import torch
from torch import nn
from dia_fast.model.cpu_weights import pack_matrices
from dia_kernels.reference.quantized import Int8Weight

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))

model = nn.Module()
for index in range(16):
    setattr(model, str(index), Int8Weight(torch.ones(2048, 2048, dtype=torch.int8), torch.ones(2048)))
before = resident()
assert pack_matrices(model, True, False)
print((resident() - before) / (16 << 22))
"""


@pytest.mark.skipif(not packed.runs_here("fbgemm-int8"), reason="this processor has no product to pack for")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what was freed, or does not")
def test_packed_matrices_take_the_place_of_those_that_were_loaded() -> None:
    """Of small ones malloc keeps what was freed, unless it is asked to give it back: they would be there twice."""
    done = subprocess.run([sys.executable, "-c", ONE_COPY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5
