"""Pages: nobody loses one, nobody shares one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_fast.errors import DiaFastError, OutOfPages
from dia_fast.model.kv_cache import BlockTable, PagePool, PageShape

CPU = torch.device("cpu")


def make_pool(pages: int, page_size: int = 4) -> PagePool:
    return PagePool(PageShape(layers=2, kv_heads=1, head_dim=2, page_size=page_size), pages, torch.float32, CPU)


def held_pages(blocks: BlockTable, row: int) -> list[int]:
    return blocks.table[row, : blocks.held(row)].tolist()


@given(st.data())
def test_every_page_is_free_or_held_once(data: st.DataObject) -> None:
    pool = make_pool(data.draw(st.integers(0, 12)))
    blocks = BlockTable(pool, 3, 24, CPU)
    for _ in range(data.draw(st.integers(0, 20))):
        row = data.draw(st.integers(0, 2))
        if data.draw(st.booleans()):
            blocks.release(row)
            assert blocks.held(row) == 0
            continue
        tokens = data.draw(st.integers(0, 24))
        before = held_pages(blocks, row)
        if blocks.missing(row, tokens) > pool.free:
            with pytest.raises(OutOfPages):
                blocks.grow(row, tokens)
            assert held_pages(blocks, row) == before
        else:
            blocks.grow(row, tokens)
            assert blocks.held(row) >= -(-tokens // 4)
            assert held_pages(blocks, row)[: len(before)] == before
        held = [page for table_row in range(3) for page in held_pages(blocks, table_row)]
        assert len(set(held)) == len(held) == pool.pages - pool.free
        assert all(0 <= page < pool.pages for page in held)


def test_running_out_says_how_many_are_needed_and_free() -> None:
    pool = make_pool(3)
    pool.take(2)
    with pytest.raises(OutOfPages, match=r"2 pages of 4 tokens are needed and 1 of 3 are free") as caught:
        pool.take(2)
    assert isinstance(caught.value, DiaFastError)
    assert pool.free == 1


def test_a_page_cannot_be_given_back_twice() -> None:
    pool = make_pool(2)
    (page,) = pool.take(1)
    pool.give([page])
    with pytest.raises(ValueError, match=f"page {page} "):
        pool.give([page])


def test_a_row_cannot_outgrow_its_table() -> None:
    blocks = BlockTable(make_pool(9), 1, 8, CPU)
    with pytest.raises(ValueError, match="9 do not fit in a row of 2 pages"):
        blocks.grow(0, 9)
    assert blocks.pool.free == 9


def test_slots_address_what_the_block_table_says() -> None:
    pool = make_pool(6)
    blocks = BlockTable(pool, 2, 12, CPU)
    for row, tokens in ((0, 2), (1, 5), (0, 11)):
        blocks.grow(row, tokens)
    slots = blocks.slot_mapping(0, 11).tolist()
    assert slots == [int(blocks.table[0, token // 4]) * 4 + token % 4 for token in range(11)]


def test_page_sizes() -> None:
    shape = PageShape(layers=18, kv_heads=4, head_dim=128, page_size=32)
    assert [shape.pages(tokens) for tokens in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert shape.bytes(torch.bfloat16) == 32 * 36_864  # bytes per token of Dia-1.6B
    pool = PagePool(PageShape(2, 3, 8, 16), 5, torch.float16, CPU)
    assert [tuple(layer.shape) for layer in pool.keys + pool.values] == [(5, 3, 16, 8)] * 4
