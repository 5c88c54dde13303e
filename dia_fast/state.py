"""The buffers of a decode step, allocated once and then only written in place.

Everything a step reads or writes lies here, in the weights or in the page pools, at addresses that never change, so
that a captured graph serves every later step. The host learns nothing from a step unless it asks.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dia_fast.cache import BlockTable, PagePool, PageShape
from dia_fast.config import DiaConfig
from dia_fast.delay import FREE


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


class DecodeState:
    """State and scratch of `batch` slots. Slot `b` owns row `b` and, when guided, the unconditional row `batch + b`.

    A slot is inert while `row[b] < 0` or `finished[b] != 0`. Dtypes and meanings: `dia_kernels.reference.embed_codes`
    for the grid, `sample` for the settings.
    """

    def __init__(
        self, config: DiaConfig, ops: ModuleType, sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> None:
        decoder, batch = config.decoder, sizes.batch
        self.batch, self.guided = batch, sizes.guided
        self.rows = 2 * batch if sizes.guided else batch
        channels, max_delay = decoder.num_channels, max(config.delay_pattern)

        def integers(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        def scratch(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.delay = torch.tensor(config.delay_pattern, dtype=torch.int32).to(device)
        self.forced = integers(batch, max_delay + 1, channels, fill=FREE)
        self.sampled, self.codes = integers(batch, channels), integers(batch, sizes.rows, channels)
        self.row, self.eos_row = integers(batch, fill=-1), integers(batch, fill=-1)
        self.first_row, self.end_row, self.finished = integers(batch), integers(batch), integers(batch)
        self.positions, self.text_lengths = integers(self.rows, fill=-1), integers(batch)

        self.seed = torch.zeros(batch, dtype=torch.int64, device=device)
        self.guidance_scale, self.temperature = torch.ones(batch, device=device), torch.ones(batch, device=device)
        self.top_p = torch.ones(batch, device=device)
        self.top_k = integers(batch)

        attention, cross = decoder.num_attention_heads, decoder.cross_num_attention_heads
        self.x = scratch(self.rows, decoder.hidden_size)
        self.x_cond = self.x[:batch]
        self.qkv = scratch(self.rows, (attention + 2 * decoder.num_key_value_heads) * decoder.head_dim)
        self.attended = scratch(self.rows, attention * decoder.head_dim)
        self.cross_q = scratch(batch, cross * decoder.cross_head_dim)
        self.cross_attended = torch.zeros_like(self.cross_q)
        self.gated = scratch(self.rows, decoder.intermediate_size)
        self.logits = torch.zeros(self.rows, channels, decoder.vocab_size, device=device)

        self.pool = PagePool(self_pages(config), sizes.pages, dtype, device)
        self.blocks = BlockTable(self.pool, self.rows, sizes.rows, device)
        self.cross_pool = PagePool(cross_pages(config), sizes.text_pages, dtype, device)
        self.cross_blocks = BlockTable(self.cross_pool, batch, sizes.text, device)
        self.workspace = ops.attention_workspace(self.rows, attention, decoder.head_dim, sizes.rows, device)
        self.cross_workspace = ops.attention_workspace(batch, cross, decoder.cross_head_dim, sizes.text, device)

    def grow(self, slot: int, rows: int) -> None:
        """Makes room for the first `rows` rows of a slot's grid. Raises OutOfPages, with nothing taken."""
        owners = [slot, slot + self.batch] if self.guided else [slot]
        self.pool.require(sum(self.blocks.missing(owner, rows) for owner in owners))
        for owner in owners:
            self.blocks.grow(owner, rows)

    def release(self, slot: int) -> None:
        """Makes a slot inert and gives its pages back."""
        self.row[slot] = -1
        self.text_lengths[slot] = 0
        self.cross_blocks.release(slot)
        for owner in [slot, slot + self.batch] if self.guided else [slot]:
            self.blocks.release(owner)
