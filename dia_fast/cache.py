"""Paged key-value memory: pools of pages, and who holds which.

One page id stands for a page in every layer. The device sees pools and block tables only; the host hands out ids.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_fast.errors import OutOfPages

PAGE_SIZE = 32  # tokens; a power of two from 16 to 64


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

    keys, values: one `[pages, kv_heads, page_size, head_dim]` tensor per layer. They are not cleared: a token is
    written before it is read. On a CPU a page that was never written takes no memory.
    """

    def __init__(self, shape: PageShape, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        size = (shape.layers, pages, shape.kv_heads, shape.page_size, shape.head_dim)
        self.keys = list(torch.empty(size, dtype=dtype, device=device))
        self.values = list(torch.empty(size, dtype=dtype, device=device))
        self.pages = pages
        self._free = list(reversed(range(pages)))
        self._taken: set[int] = set()

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
    """Which pages each sequence row holds, on the host as lists and on the device as `table` for the ops.

    table: `[rows, max_pages]` int32. Entries beyond a row's pages are stale and never read.
    """

    def __init__(self, pool: PagePool, rows: int, max_tokens: int, device: torch.device) -> None:
        self.pool = pool
        self.table = torch.zeros(rows, max(pool.shape.pages(max_tokens), 1), dtype=torch.int32, device=device)
        self._held: list[list[int]] = [[] for _ in range(rows)]

    def held(self, row: int) -> int:
        """How many pages a row has."""
        return len(self._held[row])

    def missing(self, row: int, tokens: int) -> int:
        """How many more pages the row needs to hold `tokens` tokens."""
        return max(self.pool.shape.pages(tokens) - len(self._held[row]), 0)

    def grow(self, row: int, tokens: int) -> None:
        """Gives the row the pages it lacks for `tokens` tokens; writes to the device without waiting for it.

        Raises OutOfPages, and changes nothing, if too few are free.
        """
        missing = self.missing(row, tokens)
        if not missing:
            return
        held = self._held[row]
        begin, end = len(held), len(held) + missing
        if end > self.table.shape[1]:
            raise ValueError(f"tokens: {tokens} do not fit in a row of {self.table.shape[1]} pages")
        fresh = self.pool.take(missing)
        held += fresh
        if missing == 1:
            self.table[row, begin] = fresh[0]
        else:
            self.table[row, begin:end] = torch.tensor(fresh, dtype=torch.int32).to(self.table.device)

    def release(self, row: int) -> None:
        """Gives all pages of the row back."""
        self.pool.give(self._held[row])
        self._held[row] = []

    def slots(self, row: int, tokens: int) -> Tensor:
        """`[tokens]` int64: where the row's first tokens lie, as `page * page_size + offset` (see the op `rope`)."""
        size = self.pool.shape.page_size
        pages = torch.tensor(self._held[row], dtype=torch.int64)[:, None] * size
        return (pages + torch.arange(size)).flatten()[:tokens].to(self.table.device)
