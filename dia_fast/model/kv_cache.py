"""Paged key-value memory: pools of pages, and who holds which.

One page id stands for a page in every layer. The device sees pools and block tables only; the host hands out ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast.errors import OutOfPages

PAGE_SIZE = 32  # tokens; a power of two from 16 to 64
NOBODY = -1  # stands in a block table for an owner that is not there


@dataclass(frozen=True)
class PageShape:
    """What one page holds in each layer: `[kv_heads, page_size, head_dim]` keys and as many values."""

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int = PAGE_SIZE

    def pages(self, tokens: int) -> int:
        """How many pages `tokens` tokens need."""
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
        """Makes all pages free but those that are taken."""
        self._taken: set[int] = set(taken)
        self._free = [page for page in reversed(range(self.pages)) if page not in self._taken]

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def require(self, count: int) -> None:
        """Raises OutOfPages if fewer than `count` pages are free."""
        if count > len(self._free):
            raise OutOfPages(
                f"{count} pages of {self.shape.page_size} tokens are needed and {len(self._free)} of {self.pages} are "
                "free; wait for a request to end, or make the cache larger"
            )

    def take(self, count: int) -> list[int]:
        """`count` page ids, all or none. Raises OutOfPages if fewer are free."""
        self.require(count)
        taken = [self._free.pop() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Returns pages to the pool. Raises ValueError for a page that is not taken: two owners would share it."""
        for page in pages:
            if page not in self._taken:
                raise ValueError(f"pages: page {page} is given back, but nobody holds it")
            self._taken.remove(page)
            self._free.append(page)


class BlockTable:
    """Which pages each owner holds: on the host as lists, on the device as `table`, and as the table of a step.

    An owner is a number from 0 to `owners - 1`. table: `[owners, max_pages]` int32, one row for each owner; entries
    beyond an owner's pages are stale and never read. `show` copies rows of it to the table that a step reads.
    """

    def __init__(self, pool: PagePool, owners: int, max_tokens: int, device: torch.device) -> None:
        self.pool, self.owners = pool, owners
        self._held: list[list[int]] = [[] for _ in range(owners)]
        self.table = self.new_table(owners, max_tokens, device)
        self._shown, self._rows = self.table, {owner: owner for owner in range(owners)}

    def new_table(self, rows: int, max_tokens: int, device: torch.device) -> Tensor:
        """A table for `show`, with room for `rows` owners of `max_tokens` tokens."""
        return torch.zeros(rows, max(self.pool.shape.pages(max_tokens), 1), dtype=torch.int32, device=device)

    def show(self, table: Tensor, owners: Sequence[int]) -> None:
        """Makes `table` the one that is kept up to date from now on, with row `i` for `owners[i]` (or `NOBODY`).

        Copies on the device; nothing is sent from the host.
        """
        before = self._rows if table is self._shown else {}
        rows = {owner: row for row, owner in enumerate(owners) if owner != NOBODY}
        for owner, row in rows.items():
            if before.get(owner) != row and table is not self.table:
                table[row] = self.table[owner]
        self._shown, self._rows = table, rows

    def held(self, owner: int) -> int:
        """How many pages an owner has."""
        return len(self._held[owner])

    def pages(self, owner: int) -> Tensor:
        """`[held]` int64 on the host: the pages of an owner, in the order of its tokens."""
        return torch.tensor(self._held[owner], dtype=torch.int64, device="cpu")

    def pages_of(self, owners: Sequence[int]) -> Tensor:
        """`[len(owners), max_held]` int32 on the device: a table of its own for some owners, as they are now."""
        longest = max(self.held(owner) for owner in owners)
        return torch.stack([self.table[owner, :longest] for owner in owners])

    def missing(self, owner: int, tokens: int) -> int:
        """How many more pages the owner needs to hold `tokens` tokens."""
        return max(self.pool.shape.pages(tokens) - len(self._held[owner]), 0)

    def grow(self, owner: int, tokens: int, *, write: bool = True) -> None:
        """Gives the owner the pages it lacks for `tokens` tokens.

        write: False leaves the row on the device to a later `write_row`. One page is written without anything sent from
        the host. Raises OutOfPages, and changes nothing, if too few are free.
        """
        missing = self.missing(owner, tokens)
        if not missing:
            return
        held = self._held[owner]
        begin, end = len(held), len(held) + missing
        if end > self.table.shape[1]:
            raise ValueError(f"tokens: {tokens} do not fit in a row of {self.table.shape[1]} pages")
        held += self.pool.take(missing)
        if not write:
            return
        pages = None
        if missing > 1:
            pages = torch.tensor(held[begin:], dtype=torch.int32, device="cpu").to(self.table.device)
        tables = [(self.table, owner)]
        if self._shown is not self.table and owner in self._rows:
            tables.append((self._shown, self._rows[owner]))
        for table, row in tables:
            if pages is None:
                table[row, begin] = held[begin]
            else:
                table[row, begin:end] = pages

    def write_row(self, owner: int, pages: Tensor) -> None:
        """Writes the row of an owner that grew with `write=False`. pages: `[held]`, those it holds, on the device."""
        self.table[owner, : len(pages)] = pages

    def held_pages(self, owner: int) -> list[int]:
        """The pages of an owner, in the order of its tokens."""
        return self._held[owner]

    def release(self, owner: int) -> None:
        """Gives all pages of the owner back."""
        held, self._held[owner] = self._held[owner], []
        self._rows.pop(owner, None)  # whoever is this owner next has a row of other contents
        self.pool.give(held)

    def repair(self) -> None:
        """After an error anywhere in the methods above: every page that no owner holds is free."""
        self.pool.reset(page for held in self._held for page in held)

    def reset(self) -> None:
        """Forgets who holds what, and makes all pages of the pool free."""
        self._held = [[] for _ in self._held]
        self._rows = {}
        self.pool.reset()

    def slots(self, owner: int, tokens: int, first: int = 0) -> Tensor:
        """`[tokens - first]` int64: where tokens `first` to `tokens - 1` lie, as the op `rope` wants it.

        That is `page * page_size + offset`. Computed on the device.
        """
        size, device = self.pool.shape.page_size, self.table.device
        pages = self.table[owner, : self.pool.shape.pages(tokens), None].to(torch.int64)
        return (pages * size + torch.arange(size, dtype=torch.int64, device=device)).flatten()[first:tokens]
