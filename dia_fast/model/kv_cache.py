"""Paged key-value memory: pools of pages, and who holds which.

One page id stands for a page in every layer. The device sees pools and block tables only; the host hands out ids.

What a page holds can be kept under a key after everybody has given it back. It is free all the same, and taken when no
other page is left; until then whoever has the same key holds it again without computing it.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast.errors import OutOfPages

PAGE_SIZE = 32  # tokens; a power of two from 16 to 64
NO_TABLE_ROW = -1  # stands for a table row that is not there
MOST_KEPT = 16  # keys whose pages are kept
_FEW = 4  # cells of a table that are written one by one, and not sent together


@dataclass(frozen=True)
class PageShape:
    """Shape of a page in each layer: `[kv_heads, page_size, head_dim]` keys and as many values."""

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int = PAGE_SIZE

    def pages(self, tokens: int) -> int:
        """Number of pages that `tokens` tokens need."""
        return -(-tokens // self.page_size)

    def bytes(self, dtype: torch.dtype) -> int:
        """Size of one page over all layers, keys and values."""
        return 2 * self.layers * self.kv_heads * self.page_size * self.head_dim * dtype.itemsize


class PagePool:
    """A fixed number of pages, how many hold each, and which are free.

    keys, values: one `[pages, kv_heads, page_size, head_dim]` tensor per layer, views of `all_keys` and `all_values`,
    `[layers, pages, kv_heads, page_size, head_dim]`. They are not cleared: a token is written before it is read. On a
    CPU a page that was never written takes no memory.
    """

    def __init__(self, shape: PageShape, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        size = (shape.layers, pages, shape.kv_heads, shape.page_size, shape.head_dim)
        self.all_keys = torch.empty(size, dtype=dtype, device=device)
        self.all_values = torch.empty(size, dtype=dtype, device=device)
        self.keys, self.values = list(self.all_keys), list(self.all_values)
        self.pages = pages
        self.reset()

    def reset(self, held: Iterable[int] = ()) -> None:
        """Make all pages free but those that are held, each as often as it is named; keep nothing."""
        self._holders: Counter[int] = Counter(held)
        # The page that is taken next is last in `_free`, and first in `_free_kept`.
        self._free = dict.fromkeys(page for page in reversed(range(self.pages)) if page not in self._holders)
        self._free_kept: dict[int, None] = {}
        self._kept: dict[Hashable, list[int]] = {}
        self._key_of: dict[int, Hashable] = {}

    @property
    def free(self) -> int:
        """Number of pages that nobody holds."""
        return len(self._free) + len(self._free_kept)

    def holders(self, page: int) -> int:
        """Number of those that hold a page."""
        return self._holders[page]

    def require(self, count: int) -> None:
        """Raise OutOfPages if fewer than `count` pages are free."""
        if count > self.free:
            raise OutOfPages(
                f"{count} pages of {self.shape.page_size} tokens are needed and {self.free} of {self.pages} are "
                "free; wait for a request to end, or make the cache larger"
            )

    def take(self, count: int) -> list[int]:
        """Take `count` pages, all or none.

        Returns:
            Their ids.

        Raises:
            OutOfPages: If fewer are free.
        """
        self.require(count)
        taken = []
        for _ in range(count):
            if not self._free:
                self.forget(next(iter(self._free_kept)))
            page, _ = self._free.popitem()
            self._holders[page] = 1
            taken.append(page)
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Give pages back to the pool; each is free when nobody holds it any more.

        Raises:
            ValueError: For a page that nobody holds: two requests would write to it.
        """
        for page in pages:
            if page not in self._holders:
                raise ValueError(f"pages: page {page} is given back, but nobody holds it")
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                (self._free_kept if page in self._key_of else self._free)[page] = None

    def keep(self, key: Hashable, pages: Sequence[int]) -> None:
        """Keep what held pages hold, until one of them is taken by somebody else or `MOST_KEPT` newer keys came."""
        if key in self._kept:
            return
        while len(self._kept) >= MOST_KEPT:
            self.forget(self._kept[next(iter(self._kept))][0])
        self._kept[key] = list(pages)
        self._key_of.update(dict.fromkeys(pages, key))

    def kept(self, key: Hashable) -> Sequence[int]:
        """The pages kept under a key, in the order of their tokens; none for an unknown one."""
        return self._kept.get(key, ())

    def share(self, key: Hashable, count: int) -> list[int]:
        """Hold the first `count` pages that are kept under a key, as one of possibly many."""
        pages = self._kept[key]
        self._kept[key] = self._kept.pop(key)  # the last one to be forgotten
        for page in pages[:count]:
            self._free_kept.pop(page, None)
            self._holders[page] += 1
        return pages[:count]

    def forget(self, page: int) -> None:
        """Keep no longer what a page holds, nor the other pages under its key."""
        for other in self._kept.pop(self._key_of[page], ()) if page in self._key_of else ():
            del self._key_of[other]
            if other in self._free_kept:
                del self._free_kept[other]
                self._free[other] = None


class BlockTable:
    """The pages of each table row: on the host as lists, on the device as `table`, and as the table of a step.

    `show` copies rows of `table` to the table that a step reads.

    Attributes:
        table: `[table_rows, max_pages]` int32; entries beyond a row's pages are stale and never read.
    """

    def __init__(self, pool: PagePool, table_rows: int, max_tokens: int, device: torch.device) -> None:
        self.pool, self.table_rows = pool, table_rows
        self._held: list[list[int]] = [[] for _ in range(table_rows)]
        self.table = self.new_table(table_rows, max_tokens, device)
        self._shown, self._rows = self.table, {table_row: table_row for table_row in range(table_rows)}

    def new_table(self, rows: int, max_tokens: int, device: torch.device) -> Tensor:
        """A table for `show`, `rows` rows with room for `max_tokens` tokens each."""
        return torch.zeros(rows, max(self.pool.shape.pages(max_tokens), 1), dtype=torch.int32, device=device)

    def show(self, table: Tensor, table_rows: Sequence[int]) -> None:
        """Keep `table` up to date from now on, with `table_rows[i]` (or `NO_TABLE_ROW`) as its row `i`.

        Copies on the device; nothing is sent from the host.
        """
        before = self._rows if table is self._shown else {}
        rows = {table_row: row for row, table_row in enumerate(table_rows) if table_row != NO_TABLE_ROW}
        for table_row, row in rows.items():
            if before.get(table_row) != row and table is not self.table:
                table[row] = self.table[table_row]
        self._shown, self._rows = table, rows

    def held(self, table_row: int) -> int:
        """Number of pages that a table row holds."""
        return len(self._held[table_row])

    def pages(self, table_row: int) -> Tensor:
        """`[held]` int64 on the host: the pages of a table row, in the order of its tokens."""
        return torch.tensor(self._held[table_row], dtype=torch.int64, device="cpu")

    def pages_of(self, table_rows: Sequence[int]) -> Tensor:
        """`[len(table_rows), max_held]` int32 on the device: a table of some rows, as they are now."""
        longest = max(self.held(table_row) for table_row in table_rows)
        return torch.stack([self.table[table_row, :longest] for table_row in table_rows])

    def grow(self, table_row: int, tokens: int, *, write: bool = True) -> None:
        """Take the pages that a table row lacks for `tokens` tokens.

        Args:
            write: False leaves the row on the device to a later `write_row` or `write_grown`.

        Raises:
            OutOfPages: And changes nothing, if too few are free.
        """
        grown = self.take([(table_row, self.pool.shape.pages(tokens))])
        if write:
            self.write_grown(grown)

    def take(self, rows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Take the pages that table rows lack, for all of them or for none, and write them nowhere.

        Args:
            rows: Table rows, and how many pages each is to hold.

        Returns:
            Those that lacked some, and how many each held before: for `write_grown`.

        Raises:
            OutOfPages: If too few are free.
        """
        held = self._held
        grown = [(table_row, len(held[table_row])) for table_row, pages in rows if pages > len(held[table_row])]
        if not grown:
            return grown
        wanted = dict(rows)
        most, width = max(wanted[table_row] for table_row, _ in grown), self.table.shape[1]
        if most > width:
            raise ValueError(f"rows: {most} pages do not fit in a row of {width}")
        taken = self.pool.take(sum(wanted[table_row] - before for table_row, before in grown))
        for table_row, before in grown:
            count = wanted[table_row] - before
            held[table_row] += taken[:count]
            del taken[:count]
        return grown

    def write_grown(self, rows: Sequence[tuple[int, int]]) -> None:
        """Write what rows have taken with `write=False`, all of them together.

        A few pages are written without anything sent from the host.

        Args:
            rows: Table rows, and how many pages each held before.
        """
        cells = [
            (table_row, column, page)
            for table_row, begin in rows
            for column, page in enumerate(self._held[table_row][begin:], begin)
        ]
        shown = []
        if self._shown is not self.table:
            shown = [(row, *cell) for table_row, *cell in cells if (row := self._rows.get(table_row)) is not None]
        for table, written in ((self.table, cells), (self._shown, shown)):
            _write(table, written, on_host=table.device.type == "cpu")

    def write_row(self, table_row: int, pages: Tensor) -> None:
        """Write a row that grew with `write=False`.

        Args:
            pages: `[held]`, those it holds, on the device.
        """
        self.table[table_row, : len(pages)] = pages

    def held_pages(self, table_row: int) -> list[int]:
        """The pages of a table row, in the order of its tokens."""
        return self._held[table_row]

    def share(self, table_row: int, key: Hashable, tokens: int) -> None:
        """Let a row without pages hold those kept under `key` for its first `tokens` tokens, and write them nowhere.

        Nobody writes to pages that are full. One that is not goes to a row that alone holds it, and is copied for
        others: who holds it writes behind the tokens that are kept.
        """
        pool, full = self.pool, tokens // self.pool.shape.page_size
        pages = pool.kept(key)[: pool.shape.pages(tokens)]
        copied = len(pages) > full and pool.holders(pages[full]) > 0
        self._held[table_row] = pool.share(key, full if copied else len(pages))
        if copied:
            self.grow(table_row, tokens, write=False)
            source, target = pages[full], self._held[table_row][full]
            for pools in (pool.all_keys, pool.all_values):
                pools[:, target] = pools[:, source]

    def release(self, table_row: int) -> None:
        """Give the pages of a table row back to the pool."""
        held, self._held[table_row] = self._held[table_row], []
        self._rows.pop(table_row, None)  # what is shown for this row has other pages
        self.pool.give(held)

    def keep_last(self, table_row: int) -> None:
        """Give all pages of a table row back to the pool but the last one, to which anything may be written now."""
        *held, last = self._held[table_row]
        self.pool.forget(last)
        self._held[table_row] = [last]
        self._rows.pop(table_row, None)
        self.pool.give(held)

    def repair(self) -> None:
        """After an error anywhere in the methods above: every page that no row holds is free, and none is kept."""
        self.pool.reset(page for held in self._held for page in held)

    def reset(self) -> None:
        """Forget who holds what, and make all pages of the pool free."""
        self._held = [[] for _ in self._held]
        self._rows = {}
        self.pool.reset()

    def slot_mapping(self, table_row: int, tokens: int, first: int = 0) -> Tensor:
        """`[tokens - first]` int64: where tokens `first` to `tokens - 1` lie, as the op `rope` wants it.

        That is `page * page_size + offset`. Computed on the device.
        """
        size, device = self.pool.shape.page_size, self.table.device
        pages = self.table[table_row, : self.pool.shape.pages(tokens), None].to(torch.int64)
        return (pages * size + torch.arange(size, dtype=torch.int64, device=device)).flatten()[first:tokens]


def _write(table: Tensor, cells: Sequence[tuple[int, ...]], *, on_host: bool) -> None:
    """Write cells, `(row, column, value)` each: by numpy where it can, together where they are many."""
    if on_host or len(cells) <= _FEW:
        numbers = table.numpy() if on_host else table
        for row, column, value in cells:
            numbers[row, column] = value
        return
    sent = torch.tensor(cells, dtype=torch.int64, device="cpu").T.contiguous().to(table.device)
    table[sent[0], sent[1]] = sent[2].to(table.dtype)
