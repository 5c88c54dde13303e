"""The torch references of the layers against independent formulas in fp64: norms, projections, attention, Snake."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_kernels import reference
from tests.helpers.tolerance import assert_as_good_as, evaluations
from tests.kernels.support import DTYPES, assert_within_budget, poisoned, random

CPU = torch.device("cpu")
EPS = 1e-5
THETA = 100.0


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The result of an implementation that rounds only once: the strictest low-precision reference there is."""
    return exact.float().to(dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm by definition."""
    return (
        torch.stack([row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + EPS) for row in x.double()]) * weight
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("scale", [3.0, 1e-3])
def test_rms_norm(scale: float, rows: int, dtype: torch.dtype) -> None:
    """Small inputs are where eps counts."""
    x, weight = random((rows, 100), dtype, CPU, 1, scale), random((100,), dtype, CPU, 2)
    kept = x.clone()
    exact = norm(x, weight.double())
    out = reference.rms_norm(x, weight, EPS, poisoned((rows, 100), dtype, CPU))
    assert_within_budget(
        out, (x.float() * (x.float().pow(2).mean(-1, keepdim=True) + EPS) ** -0.5 * weight.float()).to(dtype), exact
    )
    assert torch.equal(x, kept), "the input is not to be written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections(dtype: torch.dtype) -> None:
    """Each fused op against its steps in fp64; the low-precision reference rounds after every step."""
    rows, hidden, features = 5, 48, 30
    x, weight = random((rows, hidden), dtype, CPU, 1), random((features, hidden), dtype, CPU, 2)
    norm_weight = random((hidden,), dtype, CPU, 3)
    exact = norm(x, norm_weight.double()) @ weight.double().T
    steps = torch.nn.functional.linear(rounded(norm(x, norm_weight.double()), dtype), weight)

    out = reference.rms_norm_linear(x, norm_weight, weight, EPS, poisoned((rows, features), dtype, CPU))
    assert_within_budget(out, steps, exact)

    logits = poisoned((rows, 3, features // 3), torch.float32, CPU)
    reference.codebook_logits(x, norm_weight, weight, EPS, logits)
    assert torch.equal(logits.to(dtype).float(), logits), "the head's result is rounded to the compute dtype"
    assert_within_budget(logits.to(dtype).flatten(1), steps, exact)

    gate, up = exact.chunk(2, -1)
    exact = gate / (1 + torch.exp(-gate)) * up
    low_gate, low_up = steps.chunk(2, -1)
    low = (low_gate / (1 + torch.exp(-low_gate)) * low_up).to(dtype)
    out = reference.rms_norm_glu(x, norm_weight, weight, EPS, poisoned((rows, features // 2), dtype, CPU))
    assert_within_budget(out, low, exact)
    assert torch.equal(reference.glu(reference.rms_norm_linear(x, norm_weight, weight, EPS, steps), out.clone()), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [False, True])
def test_linear_residual(constant: bool, dtype: torch.dtype) -> None:
    """Rows beyond those of x get the constant."""
    x, weight, residual = (
        random((3, 20), dtype, CPU, 1),
        random((12, 20), dtype, CPU, 2),
        random((6, 12), dtype, CPU, 3),
    )
    extra = random((12,), dtype, CPU, 4)
    kept = residual.clone()
    product = x.double() @ weight.double().T
    if constant:
        got = reference.linear_residual(x, weight, residual, extra)
        assert got is residual and torch.equal(got[3:], kept[3:] + extra)
    else:
        with pytest.raises(ValueError, match="constant: needed, residual has 6 rows and x only 3"):
            reference.linear_residual(x, weight, residual.clone())
        got = reference.linear_residual(x, weight, residual[:3])
        assert torch.equal(residual[3:], kept[3:])
    assert_within_budget(got[:3], kept[:3] + rounded(product, dtype), kept[:3].double() + product)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight, ones = random((9, 64), dtype, CPU, 1), random((40, 64), dtype, CPU, 2), torch.ones(64, dtype=dtype)
    together = reference.rms_norm_linear(x, ones, weight, EPS, poisoned((9, 40), dtype, CPU))
    for row in range(9):
        alone = reference.rms_norm_linear(x[row : row + 1], ones, weight, EPS, poisoned((1, 40), dtype, CPU))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_snake(dtype: torch.dtype) -> None:
    """By the double-angle formula: sin^2 a = (1 - cos 2a) / 2."""
    x, y, alpha = (
        random((2, 3, 50), dtype, CPU, 1),
        random((2, 3, 50), dtype, CPU, 2),
        random((3,), dtype, CPU, 3).abs(),
    )
    alpha[1] = 0
    total, out = poisoned(x.shape, dtype, CPU), poisoned(x.shape, dtype, CPU)
    assert reference.snake_residual(x, y, alpha, total, out) is out
    assert torch.equal(total, x + y)
    wide = alpha.double()[:, None]
    exact = total.double() + (1 - torch.cos(2 * wide * total.double())) / (2 * (wide + 1e-9))
    low = total.float() + torch.sin(alpha.float()[:, None] * total.float()) ** 2 / (alpha.float()[:, None] + 1e-9)
    assert_within_budget(out, low.to(dtype), exact)
    assert torch.equal(reference.snake(total, alpha, torch.empty_like(out)), out)


def turned(x: Tensor, positions: Tensor, wide: torch.dtype = torch.float64) -> Tensor:
    """RoPE as a product of complex numbers of that width; x: `[n, heads, head_dim]`."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.complex(angles.cos().to(wide), angles.sin().to(wide))[:, None]
    spun = torch.complex(x[..., :half].to(wide), x[..., half:].to(wide)) * turns
    return torch.cat((spun.real, spun.imag), -1)


def tables(n: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin as the ops want them."""
    half = head_dim // 2
    angles = torch.arange(n)[:, None].double() * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    return angles.cos().float(), angles.sin().float()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query, head by head. q: `[heads, head_dim]`; k, v: `[m, kv_heads, head_dim]`; scale 1."""
    shared = q.shape[0] // k.shape[1]
    out = []
    for head in range(q.shape[0]):
        scores = k[:, head // shared] @ q[head]
        weights = (scores - scores.max()).exp()
        out.append(weights @ v[:, head // shared] / weights.sum())
    return torch.cat(out)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `attended`, by the attention that torch has of its own."""
    keys, values = (t.transpose(0, 1).repeat_interleave(q.shape[0] // t.shape[1], 0) for t in (k, v))
    return F.scaled_dot_product_attention(q[:, None], keys, values, scale=1.0).flatten()


class Pool:
    """Pages in random order, and which of them belong to whom."""

    def __init__(
        self, sequences: int, kv_heads: int, head_dim: int, page_size: int, tokens: int, dtype: torch.dtype
    ) -> None:
        each = -(-tokens // page_size)
        self.size = page_size
        order = torch.randperm(sequences * each + 2, generator=torch.Generator().manual_seed(7))
        self.table = order[: sequences * each].view(sequences, each).to(torch.int32)
        shape = (order.numel(), kv_heads, page_size, head_dim)
        self.k, self.v = poisoned(shape, dtype, CPU), poisoned(shape, dtype, CPU)

    def slot(self, sequence: int, token: int) -> tuple[int, int]:
        """Page and offset of a token."""
        return int(self.table[sequence, token // self.size]), token % self.size


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    page_size=st.integers(1, 5),
    starts=st.lists(st.integers(-1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_decoding_over_pages_is_attention_over_everything_so_far(
    kv_heads: int, shared: int, page_size: int, starts: list[int], dtype: torch.dtype
) -> None:
    """Several steps; a row starts late, and is inert (-1) until then; nothing but its own page slot is written."""
    rows, heads, head_dim, steps = len(starts), kv_heads * shared, 8, 7
    pool = Pool(rows, kv_heads, head_dim, page_size, steps, dtype)
    cos, sin = tables(steps, head_dim)
    history: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(rows)]
    for step in range(steps):
        positions = torch.tensor(
            [step - max(start, 0) if 0 <= start <= step else -1 for start in starts], dtype=torch.int32
        )
        qkv = random((rows, (heads + 2 * kv_heads) * head_dim), dtype, CPU, step)
        before = pool.k.clone()
        out = poisoned((rows, heads * head_dim), dtype, CPU)
        assert reference.rope_attention(qkv, cos, sin, pool.k, pool.v, pool.table, positions, out) is out
        q, k, v = qkv.view(rows, -1, head_dim).split((heads, kv_heads, kv_heads), 1)
        written = set()
        for row, position in enumerate(positions.tolist()):
            if position < 0:
                assert not out[row].any()
                continue
            at = torch.tensor([position])
            exact_q, exact_k = (turned(t[row : row + 1], at)[0] for t in (q, k))
            page, offset = pool.slot(row, position)
            written.add((page, offset))
            plain_k = turned(k[row : row + 1], at, torch.float32)[0].to(dtype)
            assert_within_budget(pool.k[page, :, offset], plain_k, exact_k)
            assert torch.equal(pool.v[page, :, offset], v[row])
            history[row].append((pool.k[page, :, offset].clone(), v[row].clone()))
            keys, values = (torch.stack([pair[i] for pair in history[row]]).double() for i in (0, 1))
            exact = attended(rounded(exact_q, dtype).double(), keys, values)
            if dtype == torch.float32:  # torch's fused attention takes a faster exponential than a plain one
                assert_as_good_as(out[row], evaluations(fused, exact_q.float(), keys.float(), values.float()), exact)
            else:
                low = attended(rounded(exact_q, dtype).float(), keys.float(), values.float()).to(dtype)
                assert_within_budget(out[row], low, exact)
        changed = (pool.k.nan_to_num(9.0) != before.nan_to_num(9.0)).any(1).any(-1).nonzero().tolist()
        assert {tuple(place) for place in changed} <= written


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 2),
    shared=st.integers(1, 3),
    page_size=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_cross_attention(kv_heads: int, shared: int, page_size: int, lengths: list[int]) -> None:
    head_dim, rows, dtype = 16, len(lengths), torch.float32
    pool = Pool(rows, kv_heads, head_dim, page_size, 9, dtype)
    keys, values = (random((rows, 9, kv_heads, head_dim), dtype, CPU, seed) for seed in (1, 2))
    for row, length in enumerate(lengths):  # what lies beyond stays NaN
        for token in range(length):
            page, offset = pool.slot(row, token)
            pool.k[page, :, offset], pool.v[page, :, offset] = keys[row, token], values[row, token]
    q, out = (
        random((rows, kv_heads * shared * head_dim), dtype, CPU, 3),
        poisoned((rows, kv_heads * shared * head_dim), dtype, CPU),
    )
    reference.cross_attention(q, pool.k, pool.v, pool.table, torch.tensor(lengths, dtype=torch.int32), out)
    for row, length in enumerate(lengths):
        if length == 0:
            assert not out[row].any()
            continue
        given = (q[row].view(-1, head_dim), keys[row, :length], values[row, :length])
        exact = attended(*(tensor.double() for tensor in given))
        assert_as_good_as(out[row], evaluations(fused, *given), exact)


def test_rope_of_a_prefill() -> None:
    """q and k turn, v stays, and what has a slot is stored; without pages nothing is."""
    heads, kv_heads, head_dim, page_size, n = 4, 2, 8, 3, 10
    cos, sin = tables(20, head_dim)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 19, 5, 5], dtype=torch.int32)
    qkv = random((n, (heads + 2 * kv_heads) * head_dim), torch.float32, CPU, 1)
    qkv_before = qkv.view(n, -1, head_dim).clone()
    expected = qkv_before.double()
    expected = torch.cat((turned(expected[:, :-kv_heads], positions), expected[:, -kv_heads:]), 1)
    k_pages, v_pages = (poisoned((5, kv_heads, page_size, head_dim), torch.float32, CPU) for _ in range(2))
    slot_mapping = torch.tensor([14, 0, -1, 7, 3, 4, -1, 1, 11, 2])
    again = reference.rope(qkv.clone(), cos, sin, positions, kv_heads)
    got = reference.rope(qkv, cos, sin, positions, kv_heads, k_pages, v_pages, slot_mapping)
    assert got is qkv and torch.equal(got, again)
    got = got.view(n, -1, head_dim)
    plain = evaluations(lambda x: turned(x, positions, torch.float32), qkv_before[:, :-kv_heads])
    assert_as_good_as(got[:, :-kv_heads], plain, expected[:, :-kv_heads])
    assert torch.equal(got[:, -kv_heads:].double(), expected[:, -kv_heads:])
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            assert torch.equal(k_pages[slot // page_size, :, slot % page_size], got[token, heads : heads + kv_heads])
            assert torch.equal(v_pages[slot // page_size, :, slot % page_size], got[token, heads + kv_heads :])
    assert k_pages.isnan().any(1).any(-1).sum() == v_pages.isnan().any(1).any(-1).sum() == 15 - 8


@settings(max_examples=30, deadline=None)
@given(
    kv_heads=st.integers(1, 2),
    shared=st.integers(1, 3),
    queries=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    earlier=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    causal=st.booleans(),
    paged=st.booleans(),
)
def test_ragged_attention(
    kv_heads: int, shared: int, queries: list[int], earlier: list[int], causal: bool, paged: bool
) -> None:
    """Query by query. Paged sequences have `earlier` tokens in the cache already; strided views come in."""
    head_dim, heads, total = 16, kv_heads * shared, sum(queries)
    starts = torch.tensor([sum(queries[:i]) for i in range(len(queries) + 1)], dtype=torch.int32)
    qkv = random((total, heads + 2 * kv_heads, head_dim), torch.float32, CPU, 1)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    pool = Pool(len(queries), kv_heads, head_dim, 4, 12, torch.float32)
    old = random((2, len(queries), 5, kv_heads, head_dim), torch.float32, CPU, 2)
    keys: list[tuple[Tensor, Tensor]] = []
    for i, n in enumerate(queries):
        own = slice(int(starts[i]), int(starts[i]) + n)
        before = earlier[i] if paged else 0
        keys.append((torch.cat((old[0, i, :before], k[own])), torch.cat((old[1, i, :before], v[own]))))
        for token in range(before + n):
            page, offset = pool.slot(i, token)
            pool.k[page, :, offset], pool.v[page, :, offset] = keys[i][0][token], keys[i][1][token]
    out = poisoned((total, heads * head_dim), torch.float32, CPU)
    lengths = torch.tensor([pair[0].shape[0] for pair in keys], dtype=torch.int32)
    if paged:
        reference.ragged_attention(
            q, pool.k, pool.v, starts, out, causal=causal, block_table=pool.table, kv_lengths=lengths
        )
    else:
        reference.ragged_attention(q, k, v, starts, out, causal=causal)
    for i, n in enumerate(queries):
        for query in range(n):
            row, seen = int(starts[i]) + query, int(lengths[i]) - (n - 1 - query if causal else 0)
            given = (q[row], keys[i][0][:seen], keys[i][1][:seen])
            exact = attended(*(tensor.double() for tensor in given))
            assert_as_good_as(out[row], evaluations(fused, *given), exact)


def test_ragged_attention_without_keys_gives_zero() -> None:
    q, pages, out = torch.randn(3, 2, 16), torch.full((1, 1, 4, 16), torch.nan), poisoned((3, 32), torch.float32, CPU)
    table, none = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    reference.ragged_attention(q, pages, pages, starts, out, causal=False, block_table=table, kv_lengths=none)
    assert not out.any()
