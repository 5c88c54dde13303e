"""Paged key-value memory: pools of pages, and who holds which.

One page id stands for a page in every layer. The device sees pools and block tables only; the host hands out ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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

    keys, values: one `[pages, kv_heads, page_size, head_dim]` tensor per layer. They are not cleared: a token is
    written before it is read. On a CPU a page that was never written takes no memory.
    """

    def __init__(self, shape: PageShape, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        size = (shape.layers, pages, shape.kv_heads, shape.page_size, shape.head_dim)
        self.keys = list(torch.empty(size, dtype=dtype, device=device))
        self.values = list(torch.empty(size, dtype=dtype, device=device))
        self.pages = pages
        self.reset()

    def reset(self) -> None:
        """Makes all pages free."""
        self._free = list(reversed(range(self.pages)))
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
    """Which pages each owner holds, on the host as lists, and as `table` on the device for the owners of a step.

    An owner is a number from 0 to `owners - 1`. table: `[rows, max_pages]` int32, row `i` for the `i`th owner last
    given to `show`; at first, every owner in order. Entries beyond a row's pages are stale and never read.
    """

    def __init__(self, pool: PagePool, owners: int, max_tokens: int, device: torch.device) -> None:
        self.pool, self.owners = pool, owners
        self._held: list[list[int]] = [[] for _ in range(owners)]
        self.table = self.new_table(owners, max_tokens, device)
        self._rows = {owner: owner for owner in range(owners)}

    def new_table(self, rows: int, max_tokens: int, device: torch.device) -> Tensor:
        """A table for `show`, with room for `rows` owners of `max_tokens` tokens."""
        return torch.zeros(rows, max(self.pool.shape.pages(max_tokens), 1), dtype=torch.int32, device=device)

    def show(self, table: Tensor, owners: Sequence[int]) -> None:
        """Makes `table` the one that is kept up to date from now on, with row `i` for `owners[i]` (or `NOBODY`)."""
        self.table = table
        self._rows = {owner: row for row, owner in enumerate(owners) if owner != NOBODY}
        pages = torch.zeros(len(owners), table.shape[1], dtype=torch.int32, device="cpu")
        for owner, row in self._rows.items():
            pages[row, : self.held(owner)] = self.pages(owner)
        table[: len(owners)] = pages.to(table.device)

    def held(self, owner: int) -> int:
        """How many pages an owner has."""
        return len(self._held[owner])

    def pages(self, owner: int) -> Tensor:
        """`[held]` int64 on the host: the pages of an owner, in the order of its tokens."""
        return torch.tensor(self._held[owner], dtype=torch.int64, device="cpu")

    def pages_of(self, owners: Sequence[int]) -> Tensor:
        """`[len(owners), max_held]` int32 on the device: a table of its own for some owners, as they are now."""
        lists = [self.pages(owner) for owner in owners]
        return pad_sequence(lists, batch_first=True).to(self.table.device, torch.int32)

    def missing(self, owner: int, tokens: int) -> int:
        """How many more pages the owner needs to hold `tokens` tokens."""
        return max(self.pool.shape.pages(tokens) - len(self._held[owner]), 0)

    def grow(self, owner: int, tokens: int) -> None:
        """Gives the owner the pages it lacks for `tokens` tokens; writes to the device without waiting for it.

        Raises OutOfPages, and changes nothing, if too few are free.
        """
        missing = self.missing(owner, tokens)
        if not missing:
            return
        held = self._held[owner]
        begin, end = len(held), len(held) + missing
        if end > self.table.shape[1]:
            raise ValueError(f"tokens: {tokens} do not fit in a row of {self.table.shape[1]} pages")
        fresh = self.pool.take(missing)
        held += fresh
        row = self._rows.get(owner)
        if row is None:
            return
        if missing == 1:
            self.table[row, begin] = fresh[0]
        else:
            self.table[row, begin:end] = torch.tensor(fresh, dtype=torch.int32, device="cpu").to(self.table.device)

    def release(self, owner: int) -> None:
        """Gives all pages of the owner back."""
        self.pool.give(self._held[owner])
        self._held[owner] = []

    def reset(self) -> None:
        """Forgets who holds what, and makes all pages of the pool free."""
        self._held = [[] for _ in self._held]
        self.pool.reset()

    def slots(self, owner: int, tokens: int, first: int = 0) -> Tensor:
        """`[tokens - first]` int64: where tokens `first` to `tokens - 1` lie, as the op `rope` wants it.

        That is `page * page_size + offset`.
        """
        size = self.pool.shape.page_size
        places = self.pages(owner)[:, None] * size + torch.arange(size, dtype=torch.int64, device="cpu")
        return places.flatten()[first:tokens].to(self.table.device)
