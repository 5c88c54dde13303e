"""rope, the prefill op, against fp64 formulas and the torch reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_kernels import reference
from dia_kernels.triton.rope import rope
from tests.kernels import executor
from tests.kernels.paged_cases import angles, exact_rotation, same_bits
from tests.kernels.support import DTYPES, assert_untouched, assert_within_budget, poisoned, random


def check(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, page_size: int = 0
) -> None:
    """Rotates; with pages, also stores all but every third token in shuffled slots, and looks at every other slot."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = random((tokens, (heads + 2 * kv_heads) * head_dim), dtype, device, 1, 3.0)
    cos, sin = angles(tokens + 5, head_dim, device)
    positions = torch.randint(0, tokens + 5, (tokens,), generator=generator, dtype=torch.int32).to(device)
    got, plain = qkv.clone(), qkv.clone()
    pools: tuple[torch.Tensor, ...] = ()
    slot_mapping = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    if page_size:
        pages = -(-tokens // page_size) + 2
        pools = tuple(poisoned((pages, kv_heads, page_size, head_dim), dtype, device) for _ in range(2))
        drawn = torch.randperm(pages * page_size, generator=generator)[:tokens].to(device)
        slot_mapping = torch.where(torch.arange(tokens, device=device) % 3 == 2, slot_mapping, drawn)
        assert rope(got, cos, sin, positions, kv_heads, *pools, slot_mapping) is got
    else:
        assert rope(got, cos, sin, positions, kv_heads) is got
    reference.rope(plain, cos, sin, positions, kv_heads)
    turning = (heads + kv_heads) * head_dim
    exact = torch.stack(
        [
            exact_rotation(token.view(-1, head_dim), cos[at].cpu(), sin[at].cpu()).flatten()
            for token, at in zip(qkv[:, :turning].cpu(), positions.tolist(), strict=True)
        ]
    )
    assert_within_budget(got[:, :turning], plain[:, :turning], exact)
    assert same_bits(got[:, turning:], qkv[:, turning:])
    for pool, part in zip(pools, got.view(tokens, -1, head_dim)[:, heads:].split(kv_heads, 1), strict=False):
        flat = pool.transpose(1, 2).reshape(-1, kv_heads, head_dim)
        kept = slot_mapping >= 0
        assert same_bits(flat[slot_mapping[kept]], part[kept])
        flat[slot_mapping[kept]] = torch.nan
        assert_untouched(flat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("tokens", [1, 17])
def test_rotates_and_stores(tokens: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    check(tokens, 4, 2, 32, dtype, device, page_size)


@pytest.mark.production
@pytest.mark.parametrize("shape", [(3, 16, 4), (3, 16, 16)])
def test_production_width(shape: tuple[int, int, int], device: torch.device) -> None:
    check(*shape, 128, torch.bfloat16, device, 32)


@settings(max_examples=10)
@given(
    tokens=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 14),
    sixteenths=st.integers(1, 8),
    page_size=st.sampled_from([0, 16, 64]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(tokens: int, kv_heads: int, group: int, sixteenths: int, page_size: int, dtype: torch.dtype) -> None:
    check(tokens, kv_heads * group, kv_heads, 16 * sixteenths, dtype, executor.device(), page_size)


def test_no_tokens(device: torch.device) -> None:
    cos, sin = angles(1, 16, device)
    empty = torch.empty(0, 48, device=device)
    assert rope(empty, cos, sin, torch.empty(0, dtype=torch.int32, device=device), 1) is empty


def test_the_last_slot_of_a_pool_beyond_32_bits(device: torch.device) -> None:
    pages = 2**31 // (64 * 256) + 2  # only one of them is ever touched; the rest stays unmapped on a CPU
    k_pages, v_pages = (torch.empty(pages, 1, 64, 256, dtype=torch.float16, device=device) for _ in range(2))
    qkv = random((1, 768), torch.float16, device, 1)
    cos, sin = angles(1, 256, device)
    at, slot_mapping = torch.zeros(1, dtype=torch.int32, device=device), torch.tensor([pages * 64 - 1], device=device)
    rope(qkv, cos, sin, at, 1, k_pages, v_pages, slot_mapping)
    assert same_bits(k_pages[-1, 0, -1], qkv[0, 256:512]) and same_bits(v_pages[-1, 0, -1], qkv[0, 512:])


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("qkv", "columns", {"qkv": torch.empty(2, 72)}),
    ("qkv", "columns", {"kv_heads": 5}),
    ("qkv", "strides", {"qkv": torch.empty(64, 2).T}),
    ("cos", "float32", {"cos": torch.empty(4, 8, dtype=torch.float16)}),
    ("positions", "int64", {"positions": torch.zeros(2, dtype=torch.int64)}),
    ("k_pages", "needs", {"k_pages": torch.empty(3, 2, 16, 16)}),
    ("v_pages", "needs", {"v_pages": torch.empty(4, 1, 16, 16)}),
    ("slot_mapping", "int32", {"slot_mapping": torch.zeros(2, dtype=torch.int32)}),
]


@pytest.mark.parametrize(("name", "says", "change"), BAD)
def test_bad_arguments_are_named(name: str, says: str, change: dict[str, Any]) -> None:
    good = {
        "qkv": torch.empty(2, 64),
        "cos": torch.empty(4, 8),
        "sin": torch.empty(4, 8),
        "positions": torch.zeros(2, dtype=torch.int32),
        "kv_heads": 1,
        "k_pages": torch.empty(3, 1, 16, 16),
        "v_pages": torch.empty(3, 1, 16, 16),
        "slot_mapping": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError) as caught:
        rope(**{**good, **change})
    assert name in str(caught.value) and says in str(caught.value)
