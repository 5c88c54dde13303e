"""The buffers of a decode step, allocated once and then only written in place.

Everything a step reads or writes lies here, in the weights or in the page pools, at addresses that never change, so
that a captured graph serves every later step. The host learns nothing from a step unless it asks.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import FREE
from dia_fast.model.kv_cache import NOBODY, BlockTable, PagePool, PageShape
from dia_fast.utils.ambient import isolated


@dataclass(frozen=True)
class Sizes:
    """How much a `DecodeState` has room for.

    batch: slots, one request each; guided: whether every slot has an unconditional row too; rows: the longest grid of
    a slot; text: the longest text; pages, text_pages: pages of self- and cross-attention over all slots.
    """

    batch: int
    guided: bool
    rows: int
    text: int
    pages: int
    text_pages: int


def self_pages(config: DiaConfig) -> PageShape:
    """A page of the decoder's self-attention."""
    decoder = config.decoder
    return PageShape(decoder.num_hidden_layers, decoder.num_key_value_heads, decoder.head_dim)


def cross_pages(config: DiaConfig) -> PageShape:
    """A page of the decoder's cross-attention."""
    decoder = config.decoder
    return PageShape(decoder.num_hidden_layers, decoder.cross_num_key_value_heads, decoder.cross_head_dim)


_OF_A_SLOT = (
    "forced", "sampled", "codes", "row", "eos_row", "first_row", "end_row", "finished", "status", "text_lengths",
    "seed", "guidance_scale", "temperature", "top_p", "top_k",
)  # fmt: skip
_SCRATCH_PER_SLOT = ("cross_q", "cross_attended")
_SCRATCH_PER_ROW = ("positions", "x", "qkv", "attended", "gated", "logits")


class DecodeState:
    """State and scratch of `batch` slots. Slot `b` owns row `b` and, when guided, the unconditional row `batch + b`.

    A slot is inert while `row[b] < 0` or `finished[b] != 0`. Dtypes and meanings: `dia_kernels.reference.embed_codes`
    for the grid, `sample` for the settings.

    Pages belong to lanes, `capacity` of them, numbered apart from the slots: a request keeps its lane when it changes
    its slot. At first slot `b` shows lane `b`; `show` changes that.
    """

    @isolated()
    def __init__(
        self, config: DiaConfig, ops: ModuleType, sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> None:
        decoder, batch = config.decoder, sizes.batch
        self.batch, self.guided, self.capacity, self.sizes = batch, sizes.guided, batch, sizes
        self._spare_pages = 1 if sizes.guided else 0
        self.rows = 2 * batch if sizes.guided else batch
        channels, max_delay = decoder.num_channels, max(config.delay_pattern)

        def integers(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        def scratch(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.delay = torch.tensor(config.delay_pattern, dtype=torch.int32, device="cpu").to(device)
        self.forced = integers(batch, max_delay + 1, channels, fill=FREE)
        self.status = integers(batch, channels)
        self.sampled, self.codes = integers(batch, channels), integers(batch, sizes.rows, channels)
        self.row, self.eos_row = integers(batch, fill=-1), integers(batch, fill=-1)
        self.first_row, self.end_row, self.finished = integers(batch), integers(batch), integers(batch)
        self.positions, self.text_lengths = integers(self.rows, fill=-1), integers(batch)

        self.seed = torch.zeros(batch, dtype=torch.int64, device=device)
        self.guidance_scale, self.temperature = (
            torch.ones(batch, device=device, dtype=torch.float32),
            torch.ones(batch, device=device, dtype=torch.float32),
        )
        self.top_p = torch.ones(batch, device=device, dtype=torch.float32)
        self.top_k = integers(batch)

        attention, cross = decoder.num_attention_heads, decoder.cross_num_attention_heads
        self.x = scratch(self.rows, decoder.hidden_size)
        self.x_cond, self.positions_cond = self.x[:batch], self.positions[:batch]
        self.qkv = scratch(self.rows, (attention + 2 * decoder.num_key_value_heads) * decoder.head_dim)
        self.attended = scratch(self.rows, attention * decoder.head_dim)
        self.cross_q = scratch(batch, cross * decoder.cross_head_dim)
        self.cross_attended = torch.zeros_like(self.cross_q)
        self.gated = scratch(self.rows, decoder.intermediate_size)
        self.logits = torch.zeros(self.rows, channels, decoder.vocab_size, device=device, dtype=torch.float32)

        self.pool = PagePool(self_pages(config), sizes.pages, dtype, device)
        self.blocks = BlockTable(self.pool, self.rows, sizes.rows, device)
        self.cross_pool = PagePool(cross_pages(config), sizes.text_pages, dtype, device)
        self.cross_blocks = BlockTable(self.cross_pool, batch, sizes.text, device)
        self.table, self.cross_table = self.blocks.table, self.cross_blocks.table
        self.workspace = ops.attention_workspace(self.rows, attention, decoder.head_dim, sizes.rows, device)
        self.cross_workspace = ops.attention_workspace(batch, cross, decoder.cross_head_dim, sizes.text, device)

    def view(self, batch: int, guided: bool) -> "DecodeState":
        """The first `batch` slots as a smaller state: the same memory, and block tables of its own.

        guided needs a state that is guided itself.
        """
        if batch > self.batch or guided > self.guided:
            raise ValueError(f"batch, guided: {batch}, {guided}, and the state has only {self.batch}, {self.guided}")
        part = copy(self)
        part.batch, part.guided, part.rows = batch, guided, 2 * batch if guided else batch
        for name in _OF_A_SLOT + _SCRATCH_PER_SLOT:
            setattr(part, name, getattr(self, name)[:batch])
        for name in _SCRATCH_PER_ROW:
            setattr(part, name, getattr(self, name)[: part.rows])
        part.x_cond, part.positions_cond = part.x[:batch], part.positions[:batch]
        device = self.x.device
        part.table = self.blocks.new_table(part.rows, self.sizes.rows, device)
        part.cross_table = self.cross_blocks.new_table(batch, self.sizes.text, device)
        return part

    def show(self, lanes: Sequence[int]) -> None:
        """Lets slot `b` use the pages of `lanes[b]`; fewer lanes than slots leave the others without pages."""
        owners = list(lanes)
        self.cross_blocks.show(self.cross_table, owners)
        if self.guided:
            # The unconditional rows begin at `batch`: slots without a lane lie between.
            owners += [NOBODY] * (self.batch - len(owners)) + [self.unconditional(lane) for lane in lanes]
        self.blocks.show(self.table, owners)

    def unconditional(self, lane: int) -> int:
        """The owner of a lane's unconditional pages in `blocks`; its conditional owner is the lane itself."""
        return self.capacity + lane

    def owners(self, lane: int, guided: bool) -> list[int]:
        """A lane's owners in `blocks`."""
        return [lane, self.unconditional(lane)] if guided else [lane]

    def pages_needed(self, rows: int, guided: bool) -> int:
        """Pages of self-attention that `rows` rows of a lane take.

        In a step with guidance every slot has an unconditional row. That of a request without guidance computes what
        nobody reads: all its rows go to one page, over and over.
        """
        pages = self.pool.shape.pages(rows)
        return 2 * pages if guided else pages + self._spare_pages

    def grow(self, lane: int, rows: int, guided: bool | None = None, *, write: bool = True) -> None:
        """Makes room for the first `rows` rows of a lane's grid. Raises OutOfPages, with nothing taken.

        guided: whether there is an unconditional row to keep; by default, whether the state is guided. write: as in
        `BlockTable.grow`.
        """
        guided = self.guided if guided is None else guided
        needs = [(owner, rows) for owner in self.owners(lane, guided)]
        if self._spare_pages and not guided:
            needs.append((self.unconditional(lane), 1))
        self.pool.require(sum(self.blocks.missing(*need) for need in needs))
        for owner, count in needs:
            self.blocks.grow(owner, count, write=write)
        if write and self._spare_pages and not guided:
            self.write_spare(lane)

    def write_spare(self, lane: int) -> None:
        """Fills the unconditional row of a lane without guidance with its one page."""
        owner = self.unconditional(lane)
        self.blocks.table[owner] = self.blocks.held_pages(owner)[0]

    def release(self, lane: int) -> None:
        """Gives all pages of a lane back."""
        self.cross_blocks.release(lane)
        self.release_grid(lane)

    def release_grid(self, lane: int) -> None:
        """Gives the pages of self-attention back, and keeps those of the text."""
        for owner in self.owners(lane, 2 * self.capacity == self.blocks.owners):
            self.blocks.release(owner)

    def clear(self, slot: int) -> None:
        """Makes a slot inert."""
        self.row[slot] = -1
        self.text_lengths[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Copies a slot over another and makes the first one inert. Pages stay with their lanes: `show` them anew."""
        for name in _OF_A_SLOT:
            tensor = getattr(self, name)
            tensor[target] = tensor[source]
        self.clear(source)

    def save(self, slot: int) -> dict[str, Tensor]:
        """A copy of what belongs to a slot, without its pages; `load` puts it back, into any slot."""
        return {name: getattr(self, name)[slot].clone() for name in _OF_A_SLOT}

    def load(self, slot: int, saved: Mapping[str, Tensor]) -> None:
        """Puts what `save` returned into a slot."""
        for name in _OF_A_SLOT:
            getattr(self, name)[slot] = saved[name]

    def reset(self) -> None:
        """Makes every slot inert and every page free, whatever state they are in."""
        for slot in range(self.batch):
            self.clear(slot)
        self.blocks.reset()
        self.cross_blocks.reset()
        self.reset_scratch()

    def repair(self) -> None:
        """After an error while pages were taken or given back: every page that no lane holds is free."""
        self.blocks.repair()
        self.cross_blocks.repair()

    def reset_scratch(self) -> None:
        """After a step that broke off: counters that kernels leave at zero when they end are zero again."""
        for space in (self.workspace, self.cross_workspace):
            for tensor in space or ():
                tensor.zero_()
