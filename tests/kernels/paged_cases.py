"""Inputs and fp64 results for the tests of attention over a paged cache."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dia_kernels.triton.paged_attention import AttentionWorkspace, attention_workspace
from tests.kernels.support import random

NOWHERE = 2**31 - 1  # in block tables where no page is needed: following it is out of bounds


class Cache(NamedTuple):
    """Shuffled pages that hold NaN wherever no token lies."""

    k_pages: Tensor  # [pages, kv_heads, page_size, head_dim]
    v_pages: Tensor
    block_table: Tensor  # [rows, max_pages] int32
    keys: list[Tensor]  # per row, [kv_heads, length, head_dim]
    values: list[Tensor]


def make_cache(
    lengths: Sequence[int],
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    room: int = 0,
    seed: int = 0,
) -> Cache:
    """A cache of rows of these lengths with pages for `room` more tokens each; the last page of the pool is in use."""
    counts = [-(-(length + room) // page_size) for length in lengths]
    pages = sum(counts) + 3
    order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(seed)).tolist()
    free = [pages - 1, *order]
    table = torch.full((len(lengths), max(1, *counts)), NOWHERE, dtype=torch.int32)
    k_pages, v_pages = (torch.full((pages, kv_heads, page_size, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    keys, values = [], []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        mine, free = free[:count], free[count:]
        table[row, :count] = torch.tensor(mine, dtype=torch.int32)
        k, v = (random((kv_heads, length, head_dim), dtype, torch.device("cpu"), seed + 2 * row + i) for i in (1, 2))
        for pool, tokens in ((k_pages, k), (v_pages, v)):
            for i, page in enumerate(mine):
                part = tokens[:, i * page_size : (i + 1) * page_size]
                pool[page, :, : part.shape[1]] = part
        keys.append(k)
        values.append(v)
    return Cache(k_pages.to(device), v_pages.to(device), table.to(device), keys, values)


def clone(cache: Cache) -> Cache:
    """The same cache in memory of its own."""
    return cache._replace(k_pages=cache.k_pages.clone(), v_pages=cache.v_pages.clone())


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are equal, NaN and the sign of zero included."""
    raw = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.contiguous().view(raw), right.contiguous().view(raw))


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fp64 attention of one query: q `[heads, head_dim]`, k, v `[kv_heads, n, head_dim]` -> `[heads * head_dim]`."""
    group = q.shape[0] // k.shape[0]
    k, v = (t.double().repeat_interleave(group, 0) for t in (k, v))
    weights = torch.softmax(torch.einsum("hd,hnd->hn", q.double(), k), -1)
    return torch.einsum("hn,hnd->hd", weights, v).flatten()


def exact_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """fp64 half-split RoPE of `[heads, head_dim]` by `[head_dim / 2]` angles."""
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * cos.double() - second * sin.double(), second * cos.double() + first * sin.double()), -1)


def unluckiest(evaluate: Callable[[Tensor], Tensor], width: int, exact: Tensor) -> Tensor:
    """Of eight evaluations by plain torch, the one with the largest error.

    evaluate: the result with the terms of each score taken in the order of a permutation of `width`. All scores of a
    head share its roundings, so that few errors of a result are independent, and how large a single evaluation's are
    is luck: of two evaluations equally good, normally distributed, one is over twice the other's error in 30 % of
    cases for one independent value, in 12 % for four. Over twice the worst of eight it is in 0.8 % and 0.06 %.
    """
    generator = torch.Generator().manual_seed(width)
    orders = [torch.arange(width), *(torch.randperm(width, generator=generator) for _ in range(7))]
    results = [evaluate(order) for order in orders]
    return max(results, key=lambda result: float((result.cpu().double() - exact).abs().nan_to_num().max()))


def angles(positions: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin tables, `[positions, head_dim / 2]` float32."""
    rates = 1e4 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return turns.cos().float().to(device), turns.sin().float().to(device)


def fresh_workspace(rows: int, heads: int, head_dim: int, table: Tensor, page_size: int) -> AttentionWorkspace:
    """A workspace with room for the whole block table, poisoned but for its counters."""
    workspace = attention_workspace(rows, heads, head_dim, table.shape[1] * page_size, table.device)
    workspace.partials.fill_(torch.nan)
    workspace.stats.fill_(torch.nan)
    return workspace
