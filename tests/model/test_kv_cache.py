"""Pages: nobody loses one, nobody shares one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_fast.errors import DiaFastError, OutOfPages
from dia_fast.model import kv_cache
from dia_fast.model.kv_cache import MOST_KEPT, BlockTable, PagePool, PageShape
from tests.helpers.schedules import assert_pages_sound

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
        if max(pool.shape.pages(tokens) - blocks.held(row), 0) > pool.free:
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


@given(st.data())
def test_shared_pages_are_given_back_once_by_each(data: st.DataObject) -> None:
    """Rows begin with the pages of a prompt, grow, are released, lose all but their last page, and are repaired."""
    pool = make_pool(data.draw(st.integers(8, 14)))
    blocks, rows, prompts = BlockTable(pool, 4, 40, CPU), range(4), {"a": 10, "b": 8, "c": 3}
    for _ in range(data.draw(st.integers(0, 30))):
        row = data.draw(st.sampled_from(rows))
        what = data.draw(st.sampled_from(("begin", "begin", "grow", "release", "release", "keep_last", "repair")))
        if what == "begin" and not blocks.held(row):
            key = data.draw(st.sampled_from(list(prompts)))
            there = pool.kept(key)
            shared = [page for page in there[: prompts[key] // 4] if pool.holders(page)]
            if pool.shape.pages(prompts[key]) - len(shared) > pool.free:
                continue
            if there:
                blocks.share(row, key, prompts[key])
                for page, expected in zip(blocks.held_pages(row), there, strict=True):
                    assert page == expected or pool.holders(page) == 1
                    assert pool.all_keys[0, expected, 0, 0, 0] == ord(key)
                    assert pool.all_values[1, page, 0, 3, 1] == ord(key)
                    assert pool.all_keys[1, page, 0, 0, 1] == ord(key)
            else:
                blocks.grow(row, prompts[key])
                for page in blocks.held_pages(row):
                    pool.all_keys[:, page] = pool.all_values[:, page] = ord(key)
                pool.keep(key, blocks.held_pages(row))
        elif what == "grow" and blocks.held(row) and pool.free:
            blocks.grow(row, min(4 * blocks.held(row) + 1, 40))
        elif what == "release":
            blocks.release(row)
        elif what == "keep_last" and blocks.held(row):
            last = blocks.held_pages(row)[-1]
            if pool.holders(last) > 1:
                continue  # the full last page of a prompt: a sequence has another one by then
            blocks.keep_last(row)
            assert blocks.held_pages(row) == [last]
            pool.all_keys[:, last] = pool.all_values[:, last] = -1
        elif what == "repair" and data.draw(st.integers(0, 3)) == 0:
            blocks.repair()
            assert not pool._kept
        assert_pages_sound(blocks)
        for key, pages in pool._kept.items():
            assert all(pool.all_keys[0, page, 0, 0, 0] == ord(str(key)) for page in pages)
    for row in rows:
        blocks.release(row)
    assert pool.free == pool.pages
    assert len(pool.take(pool.pages)) == pool.pages and not pool._kept


def test_few_prompts_are_kept_those_used_last() -> None:
    pool = make_pool(60)
    for key in range(MOST_KEPT):
        pages = pool.take(2)
        pool.keep(key, pages)
        pool.give(pages)
    pool.give(pool.share(0, 2))
    for key in range(MOST_KEPT, MOST_KEPT + 3):
        pages = pool.take(1)
        pool.keep(key, pages)
        pool.give(pages)
    assert [key for key in range(MOST_KEPT + 3) if pool.kept(key)] == [0, *range(4, MOST_KEPT + 3)]
    assert pool.free == 60


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
    with pytest.raises(ValueError, match="3 pages do not fit in a row of 2"):
        blocks.grow(0, 9)
    assert blocks.pool.free == 9


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 99)), max_size=30, unique_by=lambda c: c[:2]
    ),
    st.booleans(),
)
def test_cells_are_written_alike_one_by_one_and_together(cells: list[tuple[int, int, int]], on_host: bool) -> None:
    table = torch.full((5, 7), -1, dtype=torch.int32)
    kv_cache._write(table, cells, on_host=on_host)
    found = {(row, column): table[row, column].item() for row in range(5) for column in range(7)}
    assert {place: value for place, value in found.items() if value >= 0} == {cell[:2]: cell[2] for cell in cells}


@given(st.data())
def test_rows_that_grow_together_hold_and_show_what_they_would_alone(data: st.DataObject) -> None:
    pools, tables, shown = [], [], []
    for _ in range(2):
        pools.append(make_pool(40))
        tables.append(BlockTable(pools[-1], 6, 24, CPU))
        shown.append(tables[-1].new_table(4, 24, CPU))
        tables[-1].show(shown[-1], [5, 0, 3, 1])
    for _ in range(data.draw(st.integers(1, 4))):
        wanted = data.draw(st.dictionaries(st.integers(0, 5), st.integers(0, 6), min_size=1))
        tables[0].write_grown(tables[0].take(list(wanted.items())))
        for row, pages in wanted.items():
            tables[1].grow(row, 4 * pages)
    for row in range(6):
        assert held_pages(tables[0], row) == held_pages(tables[1], row) == tables[0].held_pages(row)
    for place, row in enumerate((5, 0, 3, 1)):
        assert shown[0][place, : tables[0].held(row)].tolist() == tables[0].held_pages(row)


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
