"""cross_attention against fp64 formulas and the torch reference."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_kernels import reference
from dia_kernels.triton.cross_attention import cross_attention
from dia_kernels.triton.paged_attention import attention_workspace
from tests.kernels import executor
from tests.kernels.paged_cases import exact_attention, fresh_workspace, make_cache, same_bits, unluckiest
from tests.kernels.support import DTYPES, assert_within_budget, poisoned, random

LENGTHS = (0, 1, 15, 16, 17, 63, 100, 127, 128, 129, 255, 256, 257, 600)  # borders of pages and splits, up to three


class Case:
    """One step over texts of these lengths."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        heads: int = 2,
        kv_heads: int = 2,
        head_dim: int = 16,
        page_size: int = 16,
        scale: float = 1.0,
        rotated: bool = False,
    ) -> None:
        self.heads, self.head_dim, self.page_size = heads, head_dim, page_size
        self.cache = make_cache(lengths, kv_heads, head_dim, page_size, dtype, device)
        self.q = random((len(lengths), heads * head_dim), dtype, device, 78, scale)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.rotation: tuple[Tensor, ...] = ()
        if rotated:
            angles = random((50, head_dim // 2), torch.float32, device, 79, 3.0)
            places = [(7 * row + 1) % 50 if length else -1 for row, length in enumerate(lengths)]
            self.rotation = angles.cos(), angles.sin(), torch.tensor(places, dtype=torch.int32, device=device)

    def turn(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """The op's arguments for RoPE of q, none if it is not rotated."""
        if not self.rotation:
            return {}
        cos, sin, positions = self.rotation
        return {"cos": cos, "sin": sin, "positions": positions[rows]}

    def arguments(self, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """The op's arguments up to `lengths`, for some of the rows."""
        table = self.cache.block_table[rows].contiguous()
        return self.q[rows], self.cache.k_pages, self.cache.v_pages, table, self.lengths[rows]

    def run(self, rows: slice = slice(None)) -> Tensor:
        """The kernel's output for some of the rows; checks that the workspace is left as it was found."""
        arguments = self.arguments(rows)
        out = poisoned(arguments[0].shape, self.q.dtype, self.q.device)
        workspace = fresh_workspace(len(out), self.heads, self.head_dim, arguments[3], self.page_size)
        assert cross_attention(*arguments, out, workspace, **self.turn(rows)) is out
        assert not workspace.arrivals.any(), "a counter was not set back"
        return out


def check(case: Case) -> None:
    """Run a case and compare it with the reference and with fp64."""
    out = case.run()
    read = [row for row, length in enumerate(case.lengths.tolist()) if length > 0]
    empty = [row for row in range(len(out)) if row not in read]
    assert not out[empty].any() and not out[empty].isnan().any()
    if not read:
        return
    heads = case.q.view(len(out), -1, case.head_dim)
    if case.rotation:
        cos, sin, positions = case.rotation
        cos, sin = (table[positions.long().clamp(min=0), None].double() for table in (cos, sin))
        first, second = heads.double().chunk(2, -1)
        heads = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(case.q.dtype)
    _, k_pages, *rest = case.arguments()

    def plain(order: Tensor) -> Tensor:
        order = order.to(out.device)
        q = heads[:, :, order].flatten(1)
        return reference.cross_attention(q, k_pages[..., order], *rest, torch.empty_like(out))[read]

    parts = zip(
        heads[read].cpu(), (case.cache.keys[row] for row in read), (case.cache.values[row] for row in read), strict=True
    )
    exact = torch.stack([exact_attention(*part) for part in parts])
    assert_within_budget(out[read], unluckiest(plain, case.head_dim, exact), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_pages_and_splits(dtype: torch.dtype, device: torch.device) -> None:
    check(Case(LENGTHS, device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 2, 16), (3, 1, 48), (2, 2, 80)])
def test_rotated_queries(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """As the first generation of Dia turns them; an inert row has position -1 and no text."""
    check(Case((70, 0, 3, 300), device, dtype, *shape, rotated=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 48), (2, 2, 80), (12, 2, 96), (2, 1, 256)])
def test_groups_and_head_dims(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(Case((70, 3), device, dtype, *shape, 32))


@pytest.mark.production
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_production_width(dtype: torch.dtype, rotated: bool, device: torch.device) -> None:
    check(Case((150, 40), device, dtype, 16, 16, 128, 32, scale=0.3, rotated=rotated))


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    sixteenths=st.integers(1, 5),
    page_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 0.3, 1.0]),
    rotated=st.booleans(),
)
def test_any_shape(
    lengths: list[int],
    kv_heads: int,
    group: int,
    sixteenths: int,
    page_size: int,
    dtype: torch.dtype,
    scale: float,
    rotated: bool,
) -> None:
    sizes = (kv_heads * group, kv_heads, 16 * sixteenths, page_size)
    check(Case(lengths, executor.device(), dtype, *sizes, scale, rotated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype, device: torch.device) -> None:
    case = Case([(7 * row) % 41 if row != 20 else 300 for row in range(64)], device, dtype, 1, 1, 16)
    whole = case.run()
    for first, last in ((0, 1), (20, 21), (19, 36), (62, 64)):
        assert same_bits(case.run(slice(first, last)), whole[first:last])


@pytest.mark.skipif(not executor.interpreted(), reason="only the interpreter can choose the order of programs")
def test_the_order_of_programs_does_not_matter(device: torch.device) -> None:
    from bench.tools.interpreter import ORDERS, program_order

    case = Case((600, 0, 90, 5), device, torch.bfloat16, 2, 1)
    expected = case.run()
    for order in ORDERS:
        for seed in range(3 if order == "interleaved" else 1):
            with program_order(order, seed):
                assert same_bits(case.run(), expected), order


def test_the_last_page_of_a_pool_beyond_32_bits(device: torch.device) -> None:
    pages = 2**31 // (64 * 256) + 2  # only two of them are ever touched; the rest stays unmapped on a CPU
    k_pages, v_pages = (torch.empty(pages, 1, 64, 256, dtype=torch.float16, device=device) for _ in range(2))
    small = random((2, 1, 1, 64, 256), torch.float16, device, 5)
    for pool, part in ((k_pages, small[0]), (v_pages, small[1])):
        pool[-1] = part[0]
    q = random((1, 256), torch.float16, device, 6, 0.3)
    lengths = torch.tensor([40], dtype=torch.int32, device=device)
    results = []
    for pools, page in (((k_pages, v_pages), pages - 1), ((small[0], small[1]), 0)):
        table = torch.tensor([[page]], dtype=torch.int32, device=device)
        out = poisoned((1, 256), torch.float16, device)
        workspace = attention_workspace(1, 1, 256, 64, device)
        results.append(cross_attention(q, *pools, table, lengths, out, workspace))
    assert same_bits(*results)


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("k_pages", "page size 128", {"k_pages": torch.empty(4, 2, 128, 16), "v_pages": torch.empty(4, 2, 128, 16)}),
    ("v_pages", "the same", {"v_pages": torch.empty(4, 2, 16, 32)}),
    ("q", "needs", {"q": torch.empty(2, 32)}),
    ("lengths", "int64", {"lengths": torch.zeros(2, dtype=torch.int64)}),
    ("k_pages", "strides", {"k_pages": torch.empty(4, 16, 2, 16).transpose(1, 2)}),
    ("workspace", "attention_workspace", {"workspace": None}),
    ("cos, sin, positions", "all three", {"cos": torch.empty(9, 8)}),
    (
        "cos, sin",
        "need",
        {"cos": torch.empty(9, 4), "sin": torch.empty(9, 4), "positions": torch.zeros(2, dtype=torch.int32)},
    ),
    ("positions", "int64", {"cos": torch.empty(9, 8), "sin": torch.empty(9, 8), "positions": torch.zeros(2).long()}),
]


@pytest.mark.parametrize(("name", "says", "change"), BAD, ids=[f"{name}-{says}" for name, says, _ in BAD])
def test_bad_arguments_are_named(name: str, says: str, change: dict[str, Any]) -> None:
    good = {
        "q": torch.empty(2, 64),
        "k_pages": torch.empty(4, 2, 16, 16),
        "v_pages": torch.empty(4, 2, 16, 16),
        "block_table": torch.zeros(2, 1, dtype=torch.int32),
        "lengths": torch.zeros(2, dtype=torch.int32),
        "out": torch.empty(2, 64),
        "workspace": attention_workspace(2, 4, 16, 16, "cpu"),
    }
    with pytest.raises((ValueError, TypeError)) as caught:
        cross_attention(**{**good, **change})
    assert name in str(caught.value) and says in str(caught.value)
