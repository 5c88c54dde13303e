"""ragged_attention, the prefill op, against fp64 formulas and the torch reference."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_kernels import reference
from dia_kernels.triton.ragged_attention import ragged_attention
from tests.kernels import executor
from tests.kernels.paged_cases import make_cache, same_bits, unluckiest
from tests.kernels.support import DTYPES, assert_within_budget, poisoned, random


def exact_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One sequence in fp64: q `[n, heads, head_dim]`, k, v `[m, kv_heads, head_dim]` -> `[n, heads * head_dim]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k)
    if causal:
        n, m = scores.shape[1:]
        scores = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf)
    return torch.einsum("hnm,mhd->nhd", torch.softmax(scores, -1), v).flatten(1)


class Case:
    """Sequences of these many queries; with a page size, after `past` earlier tokens each, and keys in pages."""

    def __init__(
        self,
        lengths: Sequence[int],
        causal: bool,
        dtype: torch.dtype,
        device: torch.device,
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 16,
        page_size: int = 0,
        past: int = 0,
        scale: float = 1.0,
    ) -> None:
        self.lengths, self.causal = lengths, causal
        tokens = sum(lengths)
        # Views of one tensor, as a fused projection gives them.
        qkv = random((tokens, heads + 2 * kv_heads, head_dim), dtype, device, 3, scale)
        self.q, self.k, self.v = qkv.split((heads, kv_heads, kv_heads), 1)
        self.starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.options: dict[str, Tensor] = {}
        bounds = self.starts.tolist()
        self.spans = list(zip(bounds, bounds[1:], strict=False))
        self.keys, self.values = ([t[a:b].cpu() for a, b in self.spans] for t in (self.k, self.v))
        if page_size:
            counts = [length + past if length else 0 for length in lengths]
            cache = make_cache(counts, kv_heads, head_dim, page_size, dtype, device)
            self.k, self.v = cache.k_pages, cache.v_pages
            self.keys, self.values = ([t.transpose(0, 1) for t in part] for part in (cache.keys, cache.values))
            kv_lengths = torch.tensor(counts, dtype=torch.int32, device=device)
            self.options = {"block_table": cache.block_table, "kv_lengths": kv_lengths}

    def run(self) -> Tensor:
        """The kernel's output."""
        out = poisoned((self.q.shape[0], self.q.shape[1] * self.q.shape[2]), self.q.dtype, self.q.device)
        arguments = (self.q, self.k, self.v, self.starts, out)
        assert ragged_attention(*arguments, causal=self.causal, **self.options) is out
        return out


def check(case: Case) -> None:
    """Run a case and compare it with the reference and with fp64."""
    out = case.run()

    def plain(order: Tensor) -> Tensor:
        order = order.to(out.device)
        arguments = (case.q[..., order], case.k[..., order], case.v, case.starts, torch.empty_like(out))
        return reference.ragged_attention(*arguments, causal=case.causal, **case.options)

    parts = zip(case.spans, case.keys, case.values, strict=True)
    exact = [exact_attention(case.q[a:b].cpu(), k, v, case.causal) for (a, b), k, v in parts if b > a]
    assert_within_budget(out, unluckiest(plain, case.q.shape[2], torch.cat(exact)), torch.cat(exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [0, 16])
def test_ragged_lengths(page_size: int, causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(Case((1, 0, 17, 63, 100, 3), causal, dtype, device, page_size=page_size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 48), (2, 2, 80), (6, 2, 96), (1, 1, 256)])
def test_groups_and_head_dims(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(Case((5, 20), True, dtype, device, *shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_after_cached_tokens(dtype: torch.dtype, device: torch.device) -> None:
    check(Case((3, 1, 70), True, dtype, device, page_size=32, past=37))


@pytest.mark.production
@pytest.mark.parametrize("page_size", [0, 32])
def test_production_width(page_size: int, device: torch.device) -> None:
    check(
        Case((70, 9), page_size > 0, torch.bfloat16, device, 4, 4 if page_size == 0 else 1, 128, page_size, scale=0.3)
    )


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any),
    causal=st.booleans(),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    sixteenths=st.integers(1, 5),
    page_size=st.sampled_from([0, 16, 64]),
    past=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    lengths: list[int],
    causal: bool,
    kv_heads: int,
    group: int,
    sixteenths: int,
    page_size: int,
    past: int,
    dtype: torch.dtype,
) -> None:
    heads, head_dim = kv_heads * group, 16 * sixteenths
    check(Case(lengths, causal, dtype, executor.device(), heads, kv_heads, head_dim, page_size, past))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_do_not_depend_on_each_other(dtype: torch.dtype, device: torch.device) -> None:
    case = Case((5, 1, 90, 33), True, dtype, device)
    whole = case.run()
    for begin, end in case.spans:
        out = poisoned((end - begin, whole.shape[1]), dtype, device)
        alone = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        ragged_attention(case.q[begin:end], case.k[begin:end], case.v[begin:end], alone, out, causal=True)
        assert same_bits(out, whole[begin:end])


def test_a_sequence_without_keys_gives_zero(device: torch.device) -> None:
    case = Case((4, 2), False, torch.float32, device, page_size=16)
    case.options["kv_lengths"][0] = 0
    out = case.run()
    assert not out[:4].any() and not out[:4].isnan().any() and out[4:].all()


@pytest.mark.skipif(not executor.interpreted(), reason="only the interpreter can choose the order of programs")
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    from bench.tools.interpreter import ORDERS, program_order

    case = Case((70, 3), True, torch.bfloat16, device, page_size=16)
    expected = case.run()
    for order in ORDERS:
        with program_order(order):
            assert same_bits(case.run(), expected), order


def test_no_tokens_and_no_sequences(device: torch.device) -> None:
    empty, out = torch.empty(0, 2, 16, device=device), torch.empty(0, 32, device=device)
    for starts in ([0], [0, 0, 0]):
        bounds = torch.tensor(starts, dtype=torch.int32, device=device)
        assert ragged_attention(empty, empty, empty, bounds, out, causal=True) is out


PAGED = {
    "k": torch.empty(3, 1, 16, 16),
    "v": torch.empty(3, 1, 16, 16),
    "block_table": torch.zeros(1, 1, dtype=torch.int32),
    "kv_lengths": torch.ones(1, dtype=torch.int32),
}
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("q", "head_dim 24", {"q": torch.empty(4, 2, 24)}),
    ("q", "3 heads", {"q": torch.empty(4, 3, 16), "k": torch.empty(4, 2, 16)}),
    ("k, v", "same shape", {"v": torch.empty(3, 1, 16)}),
    ("v", "float16", {"v": torch.empty(4, 1, 16, dtype=torch.float16)}),
    ("out", "needs", {"out": torch.empty(4, 16)}),
    ("starts", "int64", {"starts": torch.tensor([0, 4])}),
    ("k", "tokens", {"k": torch.empty(5, 1, 16), "v": torch.empty(5, 1, 16)}),
    ("q", "strides", {"q": torch.empty(4, 16, 2).transpose(1, 2)}),
    ("kv_lengths", "block_table", {"kv_lengths": torch.ones(1, dtype=torch.int32)}),
    ("kv_lengths", "int32 [1]", {**PAGED, "kv_lengths": None}),
    ("block_table", "int32 [1, max_pages]", {**PAGED, "block_table": torch.zeros(2, 1, dtype=torch.int32)}),
    ("v", "strides", {**PAGED, "v": torch.empty(16, 1, 3, 16).transpose(0, 2)}),
]


@pytest.mark.parametrize(("name", "says", "change"), BAD)
def test_bad_arguments_are_named(name: str, says: str, change: dict[str, Any]) -> None:
    good = {
        "q": torch.empty(4, 2, 16),
        "k": torch.empty(4, 1, 16),
        "v": torch.empty(4, 1, 16),
        "starts": torch.tensor([0, 4], dtype=torch.int32),
        "out": torch.empty(4, 32),
    }
    with pytest.raises(ValueError) as caught:
        ragged_attention(**{**good, **change}, causal=True)
    assert name in str(caught.value) and says in str(caught.value)
