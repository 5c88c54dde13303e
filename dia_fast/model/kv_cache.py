"""Paged key-value memory: pools of pages, and who holds which.

One page id stands for a page in every layer. The device sees pools and block tables only; the host hands out ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast.errors import OutOfPages

PAGE_SIZE = 32  # tokens; a power of two from 16 to 64
NO_TABLE_ROW = -1  # stands for a table row that is not there


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
    """A fixed number of pages and the list of free ones.

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

    def reset(self, taken: Iterable[int] = ()) -> None:
        """Make all pages free but those that are taken."""
        self._taken: set[int] = set(taken)
        self._free = [page for page in reversed(range(self.pages)) if page not in self._taken]

    @property
    def free(self) -> int:
        """Number of pages that nobody holds."""
        return len(self._free)

    def require(self, count: int) -> None:
        """Raise OutOfPages if fewer than `count` pages are free."""
        if count > len(self._free):
            raise OutOfPages(
                f"{count} pages of {self.shape.page_size} tokens are needed and {len(self._free)} of {self.pages} are "
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
        taken = [self._free.pop() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Give pages back to the pool.

        Raises:
            ValueError: For a page that is not taken: two requests would share it.
        """
        for page in pages:
            if page not in self._taken:
                raise ValueError(f"pages: page {page} is given back, but nobody holds it")
            self._taken.remove(page)
            self._free.append(page)


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

    def missing(self, table_row: int, tokens: int) -> int:
        """Number of pages that a table row lacks to hold `tokens` tokens."""
        return max(self.pool.shape.pages(tokens) - len(self._held[table_row]), 0)

    def grow(self, table_row: int, tokens: int, *, write: bool = True) -> None:
        """Take the pages that a table row lacks for `tokens` tokens.

        Args:
            write: False leaves the row on the device to a later `write_row`. One page is written without anything sent
                from the host.

        Raises:
            OutOfPages: And changes nothing, if too few are free.
        """
        missing = self.missing(table_row, tokens)
        if not missing:
            return
        held = self._held[table_row]
        begin, end = len(held), len(held) + missing
        if end > self.table.shape[1]:
            raise ValueError(f"tokens: {tokens} do not fit in a row of {self.table.shape[1]} pages")
        held += self.pool.take(missing)
        if not write:
            return
        pages = None
        if missing > 1:
            pages = torch.tensor(held[begin:], dtype=torch.int32, device="cpu").to(self.table.device)
        tables = [(self.table, table_row)]
        if self._shown is not self.table and table_row in self._rows:
            tables.append((self._shown, self._rows[table_row]))
        for table, row in tables:
            if pages is None:
                table[row, begin] = held[begin]
            else:
                table[row, begin:end] = pages

    def write_row(self, table_row: int, pages: Tensor) -> None:
        """Write a row that grew with `write=False`.

        Args:
            pages: `[held]`, those it holds, on the device.
        """
        self.table[table_row, : len(pages)] = pages

    def held_pages(self, table_row: int) -> list[int]:
        """The pages of a table row, in the order of its tokens."""
        return self._held[table_row]

    def release(self, table_row: int, keep: int = 0) -> None:
        """Give the pages of a table row back to the pool, all but the first `keep`."""
        held, self._held[table_row] = self._held[table_row][keep:], self._held[table_row][:keep]
        self._rows.pop(table_row, None)  # what is shown for this row has other pages
        self.pool.give(held)

    def repair(self) -> None:
        """After an error anywhere in the methods above: every page that no row holds is free."""
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
