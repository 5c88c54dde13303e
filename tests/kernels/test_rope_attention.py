"""rope_attention against fp64 formulas and the torch reference."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_kernels import reference
from dia_kernels.triton.paged_attention import attention_workspace
from dia_kernels.triton.rope_attention import SPLIT, rope_attention
from tests.helpers.tolerance import assert_as_good_as, nudged
from tests.kernels import executor
from tests.kernels.paged_cases import (
    Cache,
    angles,
    clone,
    exact_attention,
    exact_rotation,
    fresh_workspace,
    make_cache,
    same_bits,
    unluckiest,
)
from tests.kernels.support import DTYPES, assert_untouched, assert_within_budget, poisoned, random

POSITIONS = (-1, 0, 14, 15, 16, 62, 63, 64, 99, 127, 128, 300)  # page and split borders, up to five splits


class Case:
    """One step: inputs, a cache of `position` tokens per row, and the results wanted."""

    def __init__(
        self,
        positions: Sequence[int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        page_size: int = 16,
        scale: float = 1.0,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim, self.page_size = heads, kv_heads, head_dim, page_size
        rows = len(positions)
        lengths = [max(position, 0) for position in positions]
        self.cache = make_cache(lengths, kv_heads, head_dim, page_size, dtype, device, room=1)
        self.qkv = random((rows, (heads + 2 * kv_heads) * head_dim), dtype, device, 77, scale)
        self.cos, self.sin = angles(max(lengths) + 1, head_dim, device)
        self.positions = torch.tensor(positions, dtype=torch.int32, device=device)

    def arguments(self, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """The op's arguments up to `positions`, for some of the rows."""
        table = self.cache.block_table[rows].contiguous()
        return self.qkv[rows], self.cos, self.sin, self.cache.k_pages, self.cache.v_pages, table, self.positions[rows]

    def run(self, rows: slice = slice(None)) -> Tensor:
        """The kernel's output for some of the rows; checks that the workspace is left as it was found."""
        arguments = self.arguments(rows)
        count = len(arguments[6])
        out = poisoned((count, self.heads * self.head_dim), self.qkv.dtype, self.qkv.device)
        workspace = fresh_workspace(count, self.heads, self.head_dim, arguments[5], self.page_size)
        assert rope_attention(*arguments, out, workspace) is out
        assert not workspace.arrivals.any(), "a counter was not set back"
        return out

    def split(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a row's new token, as heads."""
        heads = self.qkv[row].cpu().view(-1, self.head_dim)
        return heads[: self.heads], heads[self.heads : -self.kv_heads], heads[-self.kv_heads :]

    def exact(self, row: int) -> tuple[Tensor, Tensor]:
        """A row's output and rotated new key, in fp64."""
        q, k, v = self.split(row)
        at = int(self.positions[row])
        q, k = (exact_rotation(t, self.cos[at].cpu(), self.sin[at].cpu()) for t in (q, k))
        keys = torch.cat((self.cache.keys[row].double(), k[:, None]), 1)
        return exact_attention(q, keys, torch.cat((self.cache.values[row].double(), v.double()[:, None]), 1)), k


def written(case: Case, cache: Cache, row: int) -> tuple[Tensor, Tensor]:
    """The slot of a row's new token in `cache`: k and v, `[kv_heads, head_dim]`, as views."""
    page, offset = divmod(int(case.positions[row]), case.page_size)
    page = int(cache.block_table[row, page])
    return cache.k_pages[page, :, offset], cache.v_pages[page, :, offset]


def reference_with(case: Case, order: Tensor) -> tuple[Tensor, Cache]:
    """The reference's output and cache with the pairs of each head's values in another order."""
    order = order.to(case.qkv.device)
    full = torch.cat((order, order + case.head_dim // 2))
    heads = case.qkv.view(len(case.qkv), -1, case.head_dim)
    turning, v = heads.split((case.heads + case.kv_heads, case.kv_heads), 1)
    qkv = torch.cat((turning[..., full], v), 1).flatten(1)
    cache = case.cache._replace(k_pages=case.cache.k_pages[..., full], v_pages=case.cache.v_pages.clone())
    out = torch.empty_like(qkv[:, : case.heads * case.head_dim])
    arguments = (qkv, case.cos[:, order], case.sin[:, order], cache.k_pages, cache.v_pages)
    return reference.rope_attention(*arguments, cache.block_table, case.positions, out), cache


def check(case: Case) -> None:
    """Run a case; check output, new token and that nothing else was written, against reference and fp64."""
    before = case.cache
    case.cache = clone(before)
    out = case.run()
    after, case.cache = case.cache, before
    active = [row for row, position in enumerate(case.positions.tolist()) if position >= 0]
    inert = [row for row in range(len(out)) if row not in active]
    assert not out[inert].any() and not out[inert].isnan().any()
    exact = [case.exact(row) for row in active]
    if active:
        results = torch.stack([result for result, _ in exact])
        half = case.head_dim // 2
        plain = unluckiest(lambda order: reference_with(case, order)[0][active], half, results)
        assert_within_budget(out[active], plain, results)
        plain_after = reference_with(case, torch.arange(half))[1]
    for row, (_, exact_k) in zip(active, exact, strict=True):
        k, v = written(case, after, row)
        assert same_bits(v.cpu(), case.split(row)[2])
        assert_within_budget(k, written(case, plain_after, row)[0], exact_k)
        for pool in (k, v):
            pool.fill_(torch.nan)
    assert same_bits(after.k_pages, before.k_pages) and same_bits(after.v_pages, before.v_pages)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_pages_and_splits(dtype: torch.dtype, device: torch.device) -> None:
    check(Case(POSITIONS, device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 1, 48), (2, 2, 80), (12, 2, 96), (20, 1, 32), (2, 1, 256)])
def test_groups_and_head_dims(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(Case((70, 3), device, dtype, *shape, 32))


def test_more_splits_than_are_merged_at_once(device: torch.device) -> None:
    check(Case((600,), device, torch.bfloat16, 20, 1, 32))


@pytest.mark.production
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_production_width(dtype: torch.dtype, device: torch.device) -> None:
    check(Case((300, 40), device, dtype, 16, 4, 128, 32, scale=0.3))


@settings(max_examples=10)
@given(
    positions=st.lists(st.integers(-1, 150), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    sixteenths=st.integers(1, 5),
    page_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 0.3, 1.0]),
)
def test_any_shape(
    positions: list[int], kv_heads: int, group: int, sixteenths: int, page_size: int, dtype: torch.dtype, scale: float
) -> None:
    check(Case(positions, executor.device(), dtype, kv_heads * group, kv_heads, 16 * sixteenths, page_size, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype, device: torch.device) -> None:
    case = Case([(7 * row) % 41 if row != 20 else 290 for row in range(64)], device, dtype, 2, 1, 16)
    whole = case.run()
    for first, last in ((0, 1), (20, 21), (19, 36), (62, 64)):
        assert same_bits(case.run(slice(first, last)), whole[first:last])


def test_the_block_tables_width_does_not_matter(device: torch.device) -> None:
    case = Case((300, 5), device, torch.bfloat16)
    narrow = case.run()
    table = case.cache.block_table
    wide = torch.cat((table, torch.full_like(table, 2**31 - 1)), 1)
    case.cache = case.cache._replace(block_table=wide)
    assert same_bits(case.run(), narrow)


@pytest.mark.skipif(not executor.interpreted(), reason="only the interpreter can choose the order of programs")
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    from bench.tools.interpreter import ORDERS, program_order

    case = Case((300, -1, 140, 5), device, torch.bfloat16, 4, 2, 16, 32)
    expected = case.run()
    for order in ORDERS:
        for seed in range(3 if order == "interleaved" else 1):
            with program_order(order, seed):
                assert same_bits(case.run(), expected), order


@pytest.mark.skipif(not executor.interpreted(), reason="only the interpreter tells who writes what")
def test_one_program_writes_each_new_token(device: torch.device) -> None:
    from bench.tools.interpreter import Access, listening

    writes: list[tuple[str, int, tuple[int, ...]]] = []

    def listen(access: Access) -> None:
        if access.kind == "store" and access.argument in ("k_ptr", "v_ptr") and access.offsets.size:
            writes.append((access.argument, access.offsets.size, access.program))

    with listening(listen):
        Case((300, -1, 0), device, torch.bfloat16, 4, 2, 16, 32).run()
    last = 300 // SPLIT
    owners = [(0, last, 0), (1, last, 0), (4, 0, 0), (5, 0, 0)]  # (row and kv head, split)
    assert sorted(writes) == sorted((name, 16, owner) for name in ("k_ptr", "v_ptr") for owner in owners)


def test_a_sequence_of_steps_through_one_workspace(device: torch.device) -> None:
    heads, kv_heads, head_dim, steps = 2, 1, 16, 20
    pages = poisoned((4, kv_heads, 16, head_dim), torch.float32, device)
    plain_pages, v_pages, plain_v_pages = pages.clone(), pages.clone(), pages.clone()
    exact_pages, exact_v_pages = pages.double(), pages.double()
    table = torch.tensor([[3, 0]], dtype=torch.int32, device=device)
    cos, sin = angles(steps, head_dim, device)
    workspace = attention_workspace(1, heads, head_dim, 32, device)
    for step in range(steps):
        qkv = random((1, 4 * head_dim), torch.float32, device, step)
        at = torch.tensor([step], dtype=torch.int32, device=device)
        out = poisoned((1, heads * head_dim), torch.float32, device)
        rope_attention(qkv, cos, sin, pages, v_pages, table, at, out, workspace)
        wide = (qkv.double(), cos.double(), sin.double(), exact_pages, exact_v_pages, table, at)
        exact = reference.rope_attention(*wide, torch.empty_like(out, dtype=torch.float64))
        moved = [
            reference.rope_attention(
                nudged(qkv, n), cos, sin, plain_pages.clone(), plain_v_pages.clone(), table, at, torch.empty_like(out)
            )
            for n in range(1, 8)
        ]
        plain = reference.rope_attention(qkv, cos, sin, plain_pages, plain_v_pages, table, at, torch.empty_like(out))
        assert_as_good_as(out, [plain, *moved], exact)
    assert_untouched(pages[[1, 2]])


def test_the_last_page_of_a_pool_beyond_32_bits(device: torch.device) -> None:
    pages = 2**31 // (64 * 256) + 2  # only two of them are ever touched; the rest stays unmapped on a CPU
    k_pages, v_pages = (torch.empty(pages, 1, 64, 256, dtype=torch.float16, device=device) for _ in range(2))
    cos, sin = angles(3, 256, device)
    small = random((2, 1, 1, 64, 256), torch.float16, device, 5)
    for pool, part in ((k_pages, small[0]), (v_pages, small[1])):
        pool[-1] = part[0]
    qkv = random((1, 3 * 256), torch.float16, device, 6, 0.3)
    at = torch.tensor([2], dtype=torch.int32, device=device)
    results = []
    for pools, page in (((k_pages, v_pages), pages - 1), ((small[0].clone(), small[1].clone()), 0)):
        table = torch.tensor([[page]], dtype=torch.int32, device=device)
        workspace = attention_workspace(1, 1, 256, 64, device)
        out = poisoned((1, 256), torch.float16, device)
        rope_attention(qkv, cos, sin, *pools, table, at, out, workspace)
        results.append((out, pools[0][page], pools[1][page]))
    assert all(same_bits(large, small) for large, small in zip(*results, strict=True))


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("k_pages", "page size 8", {"pages": (4, 2, 8, 16)}),
    ("k_pages", "head_dim 24", {"pages": (4, 2, 16, 24)}),
    ("k_pages", "head_dim 272", {"pages": (4, 2, 16, 272)}),
    ("out", "columns", {"out": torch.empty(2, 48)}),
    ("qkv", "needs", {"qkv": torch.empty(2, 64)}),
    ("qkv", "float16", {"qkv": torch.empty(2, 128, dtype=torch.float16)}),
    ("cos", "float32", {"cos": torch.empty(4, 16)}),
    ("positions", "int64", {"positions": torch.zeros(2, dtype=torch.int64)}),
    ("block_table", "int32", {"block_table": torch.zeros(3, 1, dtype=torch.int32)}),
    ("out", "float64", {"out": torch.empty(2, 64, dtype=torch.float64)}),
    ("block_table", "strides", {"block_table": torch.zeros(1, 2, dtype=torch.int32).T.expand(2, 2)}),
    ("workspace", "attention_workspace", {"workspace": None}),
    ("workspace", "too small", {"workspace": attention_workspace(1, 4, 16, 16, "cpu")}),
]


@pytest.mark.parametrize(("name", "says", "change"), BAD, ids=[f"{name}-{says}" for name, says, _ in BAD])
def test_bad_arguments_are_named(name: str, says: str, change: dict[str, Any]) -> None:
    pages = change.get("pages", (4, 2, 16, 16))
    good = {
        "qkv": torch.empty(2, 128),
        "cos": torch.empty(4, 8),
        "sin": torch.empty(4, 8),
        "k_pages": torch.empty(pages),
        "v_pages": torch.empty(pages),
        "block_table": torch.zeros(2, 1, dtype=torch.int32),
        "positions": torch.zeros(2, dtype=torch.int32),
        "out": torch.empty(2, 64),
        "workspace": attention_workspace(2, 4, 16, 16, "cpu"),
    }
    with pytest.raises((ValueError, TypeError)) as caught:
        rope_attention(**{**good, **{key: value for key, value in change.items() if key != "pages"}})
    assert name in str(caught.value) and says in str(caught.value)
