"""Packed weights: what they hold, what comes out of their products, and what a packed model still can do."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_fast import Dia
from dia_fast.engine import Request, generate
from dia_fast.errors import InputError
from dia_fast.model import cpu_weights
from dia_fast.model.cpu_weights import PLAIN, TABLE, check_product, choose
from dia_fast.model.model import DiaModel
from dia_kernels import get_ops, reference
from dia_kernels.reference import PackedWeight, packed
from dia_kernels.reference.packed import FbgemmHalf
from tests.engine.test_engine import CONFIG, random_model, random_request
from tests.kernels.support import assert_within_budget, poisoned, random

CPU = torch.device("cpu")
EPS = 1e-5
NARROW = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(
    "x86" not in torch.backends.quantized.supported_engines or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="FBGEMM needs an x86 processor with AVX2, and a torch that was built with it",
)


FBGEMM = "fbgemm-fp16"
CASES = [
    (name, dtype)
    for name, (_, dtypes) in packed.PRODUCTS.items()
    for dtype in dtypes
    if packed.runs_here(name) and dtype.is_floating_point
]
each_case = pytest.mark.parametrize(("product", "dtype"), CASES, ids=[f"{n}-{str(d)[6:]}" for n, d in CASES])


def pack(weight: Tensor, product: str = FBGEMM) -> PackedWeight:
    result = packed.pack(weight, product)
    assert isinstance(result, PackedWeight)
    return result


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(NARROW),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    spread=st.integers(0, 60),
    top=st.integers(-120, 127),
    seed=st.integers(0, 99),
)
def test_a_weight_is_exact_down_to_two_to_the_minus_31_of_the_largest(
    dtype: torch.dtype, rows: int, columns: int, spread: int, top: int, seed: int
) -> None:
    """Magnitudes over `spread` powers of two below 2^top; what is smaller still has an error that is tiny beside it."""
    generator = torch.Generator().manual_seed(seed)
    top = top if dtype == torch.bfloat16 else min(max(top, -14), 14)
    exponents = top - spread * torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    weight = (signs * torch.exp2(exponents)).to(dtype)
    largest = weight.double().abs().max()
    error = (pack(weight).unpack().double() - weight.double()).abs()
    assert (error <= largest * 2**-39).all()
    if dtype == torch.bfloat16:
        assert not error[weight.double().abs() >= largest * 2**-31].any()
    else:
        assert not error.any()


def test_large_fp16_weights_are_not_cut_off() -> None:
    weight = torch.tensor([[65504.0, -65504.0, 1.0, 2.0**-14, 0.0]], dtype=torch.float16)
    assert torch.equal(pack(weight).unpack(), weight.float())
    assert not pack(torch.zeros(3, 5, dtype=torch.bfloat16)).unpack().any()


def test_what_cannot_be_packed_comes_back_as_it_is() -> None:
    weight = random((8, 16), torch.bfloat16, CPU, 1)
    spoiled = [weight.clone() for _ in range(3)]
    for tensor, value in zip(spoiled, (torch.inf, -torch.inf, torch.nan), strict=True):
        tensor[3, 4] = value
    others = (weight.float(), weight[0], weight[:0], weight.to("meta"), weight.view(torch.int16))
    for tensor in (*spoiled, *others):
        assert packed.pack(tensor, FBGEMM) is tensor


def test_a_product_that_does_not_run_here_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        assert choose(torch.bfloat16, isa="avx2").product == PLAIN
    finally:
        torch.backends.quantized.engine = before
    monkeypatch.setattr(packed, "row_counts", lambda: ())
    monkeypatch.setattr(packed, "_onednn_runs", lambda: False)
    for isa in TABLE:
        assert choose(torch.bfloat16, isa=isa).product == PLAIN
    assert not random_model(dtype=torch.bfloat16).pack().packed
    with pytest.raises(InputError, match="does not run on this processor"):
        choose(torch.bfloat16, FBGEMM)


def test_the_table_names_products_that_take_the_dtype() -> None:
    for choices in TABLE.values():
        for kind, product in choices.items():
            assert getattr(torch, kind) in packed.PRODUCTS[product][1]


@pytest.mark.parametrize(
    ("told", "limit", "isa"),
    [
        ({"amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2"}, "", "amx"),
        ({"amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2"}, "AVX512_CORE_BF16", "avx512_bf16"),
        ({"amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2"}, "AVX512_CORE_VNNI", "avx512"),
        ({"amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2"}, "AVX2_VNNI", "avx2"),
        ({"avx512_bf16", "avx512f", "avx2"}, "ALL", "avx512_bf16"),
        ({"avx512f", "avx2"}, "DEFAULT", "avx512"),
        ({"avx2"}, "", "avx2"),
        ({"sse4_2"}, "", "other"),
    ],
)
def test_the_instruction_set_is_the_best_that_is_there_and_allowed(
    monkeypatch: pytest.MonkeyPatch, told: set[str], limit: str, isa: str
) -> None:
    monkeypatch.setattr(cpu_weights, "_features", lambda: told)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_weights.instruction_set() == isa
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_weights.instruction_set() == "other"


def test_a_product_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(torch.bfloat16, FBGEMM).product == FBGEMM
    monkeypatch.setenv(cpu_weights.VARIABLE, FBGEMM)
    assert choose(torch.bfloat16, isa="amx") == (FBGEMM, f"{cpu_weights.VARIABLE} says so")
    assert choose(torch.bfloat16, PLAIN).product == PLAIN, "an argument goes before the environment"
    assert choose(torch.bfloat16, False).product == PLAIN
    assert choose(torch.float32).product == PLAIN, "the variable is about the weights that it fits"
    monkeypatch.setenv(cpu_weights.VARIABLE, f"{FBGEMM}, fbgemm-int8")
    assert choose(torch.bfloat16, isa="amx").product == FBGEMM
    assert choose(torch.int8, isa="amx").product == "fbgemm-int8"
    monkeypatch.delenv(cpu_weights.VARIABLE)
    assert choose(torch.int8, FBGEMM).product == choose(torch.int8).product, "what it does not take goes by the table"
    monkeypatch.setenv(cpu_weights.VARIABLE, "mkl")
    for dtype, product, wrong in (
        (torch.bfloat16, "avx9", "'avx9' .* is unknown; use one of plain, fbgemm-fp16"),
        (torch.bfloat16, True, "'mkl' .*says so"),
        (torch.float32, FBGEMM, "does not take weights in float32; use plain"),
    ):
        with pytest.raises(InputError, match=wrong):
            choose(dtype, product)
    with pytest.raises(InputError, match="pack must be True, False or the name"):
        check_product(3, torch.bfloat16, CPU)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a product of CPUs, but the model goes to cuda"):
        check_product(FBGEMM, torch.bfloat16, torch.device("cuda"))


def test_from_pretrained_packs_as_it_is_told() -> None:
    plain = Dia.from_pretrained("demo", device="cpu", dtype="bf16", codec=None, pack=False)
    assert not plain.model.packed and plain.model.state_dict()
    packed_one = Dia.from_pretrained("demo", device="cpu", dtype="bf16", codec=None, pack=FBGEMM)
    assert isinstance(packed_one.model.decoder.layers[0].qkv, FbgemmHalf)


def norm_linear(x: Tensor, weight: Tensor | PackedWeight, norm: Tensor) -> Tensor:
    out = poisoned((x.shape[0], weight.shape[0]), x.dtype, CPU)
    return reference.rms_norm_linear(x, norm, weight, EPS, out)


def residual(x: Tensor, weight: Tensor | PackedWeight, norm: Tensor) -> Tensor:
    return reference.linear_residual(x, weight, torch.ones(x.shape[0], weight.shape[0], dtype=x.dtype))


def gated(x: Tensor, weight: Tensor | PackedWeight, norm: Tensor) -> Tensor:
    out = poisoned((x.shape[0], weight.shape[0] // 2), x.dtype, CPU)
    return reference.rms_norm_glu(x, norm, weight, EPS, out)


def logits(x: Tensor, weight: Tensor | PackedWeight, norm: Tensor) -> Tensor:
    out = poisoned((x.shape[0], 2, weight.shape[0] // 2), torch.float32, CPU)
    reference.codebook_logits(x, norm, weight, EPS, out)
    assert out.equal(out.to(x.dtype).float()) or out.isnan().any(), "the head's result is rounded to the compute dtype"
    return out.to(x.dtype)


OPS = {"rms_norm_linear": norm_linear, "linear_residual": residual, "rms_norm_glu": gated, "codebook_logits": logits}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
each_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)
Op = Callable[[Tensor, Tensor | PackedWeight, Tensor], Tensor]


@each_op
@each_case
@pytest.mark.parametrize(("hidden", "features"), [(40, 34), (1100, 18)])
def test_every_number_of_rows_gives_the_same_bits(
    op: Op, product: str, dtype: torch.dtype, hidden: int, features: int
) -> None:
    x, norm = random((200, hidden), dtype, CPU, 1), random((hidden,), dtype, CPU, 2)
    weight = pack(random((features, hidden), dtype, CPU, 3), product)
    alone = torch.cat([op(row[None], weight, norm) for row in x])
    for rows in (*range(1, 65), 127, 128, 129, 200):
        assert torch.equal(op(x[:rows], weight, norm), alone[:rows]), f"{rows} rows"


@each_dtype
def test_the_number_of_threads_does_not_matter(dtype: torch.dtype) -> None:
    x, norm = random((64, 600), dtype, CPU, 1), random((600,), dtype, CPU, 2)
    weight = pack(random((500, 600), dtype, CPU, 3))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [norm_linear(x[:rows], weight, norm) for rows in (1, 2, 31, 64)]
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert torch.equal(result, results[3][: len(result)])


@each_op
@each_case
def test_packed_products_are_no_worse_than_plain_ones(op: Op, product: str, dtype: torch.dtype) -> None:
    x, norm = random((7, 330), dtype, CPU, 1), random((330,), dtype, CPU, 2)
    weight = random((48, 330), dtype, CPU, 3, 330**-0.5)
    exact = op(x.double(), weight.double(), norm.double()) if op is residual else None
    if exact is None:
        wide = x.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double() @ weight.double().T
        if op is gated:
            gate, up = exact.chunk(2, -1)
            exact = gate / (1 + torch.exp(-gate)) * up
        exact = exact.view(7, 2, -1) if op is logits else exact
    assert_within_budget(op(x, pack(weight, product), norm), op(x, weight, norm), exact)


@each_op
@each_case
def test_a_row_of_nan_stays_alone(op: Op, product: str, dtype: torch.dtype) -> None:
    x, norm = random((5, 80), dtype, CPU, 1), random((80,), dtype, CPU, 2)
    weight = pack(random((18, 80), dtype, CPU, 3), product)
    clean = op(x, weight, norm)
    x[2] = torch.nan
    result = op(x, weight, norm)
    assert result[2].isnan().all() and torch.equal(result[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@each_case
def test_strided_activations_are_read_as_they_lie(product: str, dtype: torch.dtype) -> None:
    x, weight = random((6, 2, 40), dtype, CPU, 1), pack(random((18, 40), dtype, CPU, 2), product)
    assert torch.equal(weight.linear(x[:, 1]), weight.linear(x[:, 1].clone()))
    assert torch.equal(weight.linear(x[:, 1].float()), weight.linear(x[:, 1].clone()))


@each_case
def test_a_request_gets_the_same_codes_alone_and_in_a_batch(product: str, dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype).pack(product)
    assert model.packed
    requests = [random_request(seed=seed, guidance_scale=scale) for seed, scale in ((1, 3.0), (2, None), (3, 2.0))]
    for request, together in zip(requests, generate(model, requests), strict=True):
        assert torch.equal(generate(model, [request])[0].delayed_codes, together.delayed_codes)


def test_the_tensors_of_a_packed_model_are_let_go() -> None:
    model = random_model(dtype=torch.bfloat16)
    layer = model.decoder.layers[0]
    matrix, norm = weakref.ref(layer.qkv.untyped_storage()), layer.self_norm
    model.pack()
    assert matrix() is None and isinstance(layer.qkv, PackedWeight)
    assert layer.self_norm is norm and isinstance(model.decoder.embedding, Tensor)


def test_a_packed_model_says_so_when_its_tensors_are_wanted() -> None:
    plain = random_model(dtype=torch.bfloat16)
    weights = copy.deepcopy(plain.state_dict())
    model = DiaModel(CONFIG, get_ops("torch")).load(weights).pack()
    assert model.pack() is model
    for forbidden in (
        model.state_dict,
        model.decoder.state_dict,
        model.finalize,
        model.requires_grad_,
        model.float,
        lambda: model.load(plain.state_dict()),
        lambda: model.to("meta"),
    ):
        with pytest.raises(InputError, match="packed for inference"):
            forbidden()
    model.requires_grad_(False)
    assert generate(model, [Request([1, 2], max_new_tokens=17, temperature=0.0)])


def test_float32_models_stay_as_they_are() -> None:
    model = random_model()
    before = model.state_dict()
    assert not model.pack().packed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
