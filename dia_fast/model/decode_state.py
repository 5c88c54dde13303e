"""The buffers of a decode step, allocated once and then only written in place.

Everything a step reads or writes lies here, in the weights or in the page pools, at addresses that never change, so
that a captured graph serves every later step. The host learns nothing from a step unless it asks.
"""

from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import FREE
from dia_fast.model.kv_cache import NO_TABLE_ROW, BlockTable, PagePool, PageShape
from dia_fast.utils.ambient import isolated


@dataclass(frozen=True)
class Sizes:
    """Capacity of a `DecodeState`.

    Attributes:
        batch: Most requests.
        guided: Each request has an unconditional batch row as well.
        steps: Of the longest request.
        text: Bytes of the longest text.
        pages: Of self-attention, over all requests.
        text_pages: Of cross-attention, over all requests.
    """

    batch: int
    guided: bool
    steps: int
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


_PER_REQUEST = (
    "prompt_codes", "sampled", "codes", "step", "eos_step", "first_step", "end_step", "finished", "status",
    "text_lengths", "seed", "guidance_scale", "temperature", "top_p", "top_k",
)  # fmt: skip
_SCRATCH_PER_REQUEST = ("cross_q", "cross_attended")
_SCRATCH_PER_ROW = ("positions", "x", "qkv", "attended", "gated", "logits")


class DecodeState:
    """State and scratch of `batch` requests.

    The request at batch index `b` has batch row `b` and, when guided, the unconditional batch row `batch + b`. It is
    inert while `step[b] < 0` or `finished[b] != 0`. Dtypes and meanings: `dia_kernels.reference.embed_codes` for the
    codes, `sample` for the sampling parameters.

    Pages are listed in block tables, under a table index that a request keeps when it moves within the batch. There are
    `capacity` of them. At first batch index `b` uses table index `b`; `show` changes that.

    extras: further tensors of each request, by name, with their values at first. They become `[batch, *shape]` and move
    with their requests.
    """

    @isolated()
    def __init__(
        self,
        config: DiaConfig,
        ops: ModuleType,
        sizes: Sizes,
        dtype: torch.dtype,
        device: torch.device,
        extras: Mapping[str, Tensor] | None = None,
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
        self.prompt_codes = integers(batch, max_delay + 1, channels, fill=FREE)
        self.status = integers(batch, channels)
        self.sampled, self.codes = integers(batch, channels), integers(batch, sizes.steps, channels)
        self.step, self.eos_step = integers(batch, fill=-1), integers(batch, fill=-1)
        self.first_step, self.end_step, self.finished = integers(batch), integers(batch), integers(batch)
        self.positions, self.text_lengths = integers(self.rows, fill=-1), integers(batch)

        self.seed = torch.zeros(batch, dtype=torch.int64, device=device)
        self.guidance_scale, self.temperature = (
            torch.ones(batch, device=device, dtype=torch.float32),
            torch.ones(batch, device=device, dtype=torch.float32),
        )
        self.top_p = torch.ones(batch, device=device, dtype=torch.float32)
        self.top_k = integers(batch)
        self.first_extras = {name: value.detach().to(device, copy=True) for name, value in (extras or {}).items()}
        self.extras = {
            name: value.expand(batch, *value.shape).contiguous().clone() for name, value in self.first_extras.items()
        }

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
        self.blocks = BlockTable(self.pool, self.rows, sizes.steps, device)
        self.cross_pool = PagePool(cross_pages(config), sizes.text_pages, dtype, device)
        self.cross_blocks = BlockTable(self.cross_pool, batch, sizes.text, device)
        self.table, self.cross_table = self.blocks.table, self.cross_blocks.table
        self.workspace = ops.attention_workspace(self.rows, attention, decoder.head_dim, sizes.steps, device)
        self.cross_workspace = ops.attention_workspace(batch, cross, decoder.cross_head_dim, sizes.text, device)

    def view(self, batch: int, guided: bool) -> "DecodeState":
        """The first `batch` requests as a smaller state: the same memory, and block tables of its own.

        guided needs a state that is guided itself.
        """
        if batch > self.batch or guided > self.guided:
            raise ValueError(f"batch, guided: {batch}, {guided}, and the state has only {self.batch}, {self.guided}")
        part = copy(self)
        part.batch, part.guided, part.rows = batch, guided, 2 * batch if guided else batch
        for name in _PER_REQUEST + _SCRATCH_PER_REQUEST:
            setattr(part, name, getattr(self, name)[:batch])
        for name in _SCRATCH_PER_ROW:
            setattr(part, name, getattr(self, name)[: part.rows])
        part.extras = {name: tensor[:batch] for name, tensor in self.extras.items()}
        part.x_cond, part.positions_cond = part.x[:batch], part.positions[:batch]
        device = self.x.device
        part.table = self.blocks.new_table(part.rows, self.sizes.steps, device)
        part.cross_table = self.cross_blocks.new_table(batch, self.sizes.text, device)
        return part

    def show(self, table_idxs: Sequence[int]) -> None:
        """Let batch index `b` use the pages of `table_idxs[b]`; where there are fewer, the others have no pages."""
        table_rows = list(table_idxs)
        self.cross_blocks.show(self.cross_table, table_rows)
        if self.guided:
            # The unconditional rows begin at `batch`: batch indices without pages lie between.
            table_rows += [NO_TABLE_ROW] * (self.batch - len(table_rows)) + [
                self.unconditional(table_idx) for table_idx in table_idxs
            ]
        self.blocks.show(self.table, table_rows)

    def unconditional(self, table_idx: int) -> int:
        """The row of `blocks` with a request's unconditional pages; the conditional one is the table index itself."""
        return self.capacity + table_idx

    def table_rows(self, table_idx: int, guided: bool) -> list[int]:
        """A request's rows in `blocks`."""
        return [table_idx, self.unconditional(table_idx)] if guided else [table_idx]

    def pages_needed(self, steps: int, guided: bool, key: Hashable = None, prompt: int = 0) -> int:
        """Free pages of self-attention that `steps` steps of a request take.

        In a step with guidance every request has an unconditional batch row. That of a request without guidance
        computes what nobody reads: all its keys and values go to one page, over and over.

        Args:
            steps: Of the request.
            guided: There is an unconditional batch row to keep.
            key: As in `share_prompt`; the pages that others hold already are not counted.
            prompt: Steps of the prompt.
        """
        pages, full = self.pool.shape.pages(steps), prompt // self.pool.shape.page_size
        if not guided:
            return pages + self._spare_pages
        return 2 * pages - sum(self.pool.holders(page) > 0 for page in self.pool.kept(key)[:full])

    def keep_prompt(self, table_idx: int, key: Hashable, prompt: int) -> None:
        """Keep the unconditional keys and values of a prompt of `prompt` steps, for `share_prompt`.

        They depend on nothing but the prompt's codes and the model: `key` stands for both.
        """
        table_row = self.unconditional(table_idx)
        self.pool.keep(key, self.blocks.held_pages(table_row)[: self.pool.shape.pages(prompt)])

    def share_prompt(self, table_idx: int, key: Hashable, prompt: int) -> bool:
        """Give a request without pages the kept unconditional ones of its prompt; tell if there are any."""
        if not self.pool.kept(key):
            return False
        self.blocks.share(self.unconditional(table_idx), key, prompt)
        return True

    def grow(
        self, table_idx: int, steps: int, guided: bool | None = None, *, write: bool = True
    ) -> list[tuple[int, int]]:
        """Make room for the first `steps` steps of a request.

        Args:
            guided: There is an unconditional batch row to keep; by default as the state says.
            write: As in `BlockTable.grow`.

        Returns:
            The table rows that grew, as `BlockTable.write_grown` takes them.

        Raises:
            OutOfPages: With nothing taken.
        """
        guided = self.guided if guided is None else guided
        pages, spare = self.pool.shape.pages(steps), self._spare_pages and not guided
        needs = [(table_idx, pages)]
        if guided or spare:
            needs.append((self.unconditional(table_idx), pages if guided else 1))
        grown = self.blocks.take(needs)
        if write:
            self.blocks.write_grown(grown)
            if spare:
                self.write_spare(table_idx)
        return grown

    def write_spare(self, table_idx: int) -> None:
        """Fill the unconditional table row of a request without guidance with its one page."""
        table_row = self.unconditional(table_idx)
        self.blocks.table[table_row] = self.blocks.held_pages(table_row)[0]

    def release(self, table_idx: int) -> None:
        """Give all pages of a request back."""
        self.cross_blocks.release(table_idx)
        self.release_self_pages(table_idx)

    def release_self_pages(self, table_idx: int) -> None:
        """Give the pages of self-attention back, and keep those of the text."""
        for table_row in self.table_rows(table_idx, 2 * self.capacity == self.blocks.table_rows):
            self.blocks.release(table_row)

    def end_guidance(self, batch_idx: int, table_idx: int) -> None:
        """Make a guided request one without guidance from the next step on, and give its unconditional pages back.

        `show` its pages anew.
        """
        self.guidance_scale[batch_idx] = 1.0
        self.blocks.keep_last(self.unconditional(table_idx))
        self.write_spare(table_idx)

    def clear(self, batch_idx: int) -> None:
        """Make a batch index inert."""
        self.step[batch_idx] = -1
        self.text_lengths[batch_idx] = 0
        for name, tensor in self.extras.items():
            tensor[batch_idx] = self.first_extras[name]

    def move(self, source: int, target: int) -> None:
        """Copy a request to another batch index and leave its own inert. `show` its pages anew."""
        for tensor in self._per_request().values():
            tensor[target] = tensor[source]
        self.clear(source)

    def save(self, batch_idx: int) -> dict[str, Tensor]:
        """A copy of a request's state, without its pages; `load` puts it back, at any batch index."""
        return {name: tensor[batch_idx].clone() for name, tensor in self._per_request().items()}

    def load(self, batch_idx: int, saved: Mapping[str, Tensor]) -> None:
        """Put back what `save` returned."""
        for name, tensor in self._per_request().items():
            tensor[batch_idx] = saved[name]

    def _per_request(self) -> dict[str, Tensor]:
        extras = {f"extras.{name}": tensor for name, tensor in self.extras.items()}
        return {name: getattr(self, name) for name in _PER_REQUEST} | extras

    def reset(self) -> None:
        """Make every batch index inert and every page free, in any state."""
        for batch_idx in range(self.batch):
            self.clear(batch_idx)
        self.blocks.reset()
        self.cross_blocks.reset()
        self.reset_scratch()

    def repair(self) -> None:
        """After an error while pages were taken or given back: every page that no request holds is free."""
        self.blocks.repair()
        self.cross_blocks.repair()

    def reset_scratch(self) -> None:
        """After a step that broke off: counters that kernels leave at zero when they end are zero again."""
        for space in (self.workspace, self.cross_workspace):
            for tensor in space or ():
                tensor.zero_()
