"""The buffers of a pass that computes several steps of each request at once."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import DecodeState
from dia_fast.utils.ambient import isolated


class Attended(NamedTuple):
    """Rows that one launch of self-attention computes: qkv, block table, positions, output, see `rope_attention`.

    kv_ready: The keys and values before the row's own come from launches that have ended.
    """

    qkv: Tensor
    table: Tensor
    positions: Tensor
    out: Tensor
    kv_ready: bool


class VerifyState:
    """Scratch for `steps` steps of each request of a `DecodeState`, and what was chosen after each.

    Rows lie as `[branches, steps, batch]`, so that all conditional ones come first. Pages, block tables and sampling
    parameters are those of the state.

    Attributes:
        inputs: `[steps, batch, channels]` int32, the choices that each step is formed from; written by the caller.
        chosen: As inputs: what the model chooses after each step.
        logits: `[steps, rows, channels, vocab]` float32, rows as in the state.
        status: As inputs, see `sample`.
        step: `[steps, batch]` int32, the state's after each step; likewise eos_step and finished.
    """

    @isolated()
    def __init__(self, config: DiaConfig, ops: ModuleType, s: DecodeState, steps: int) -> None:
        decoder, device, batch = config.decoder, s.x.device, s.batch
        self.steps, self.batch, self.guided, self.branches = steps, batch, s.guided, s.rows // batch
        rows = self.branches * steps * batch

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def like(buffer: Tensor, count: int) -> Tensor:
            return buffer.new_zeros(count, *buffer.shape[1:])

        self.inputs, self.chosen, self.status = (integers(steps, *s.sampled.shape) for _ in range(3))
        self.step, self.eos_step, self.finished = (integers(steps, batch) for _ in range(3))
        self.positions = integers(rows)
        self.x, self.qkv, self.attended, self.gated = (
            like(buffer, rows) for buffer in (s.x, s.qkv, s.attended, s.gated)
        )
        self.x_cond, self.positions_cond = self.x[: steps * batch], self.positions[: steps * batch]
        self.cross_q, self.cross_attended = like(s.cross_q, steps * batch), like(s.cross_attended, steps * batch)
        self.cross_table, self.text_lengths = like(s.cross_table, steps * batch), integers(steps * batch)
        self.flat_logits = like(s.logits, rows)
        self.logits = self.flat_logits.view(steps, s.rows, *s.logits.shape[1:])
        if s.guided:
            self.logits = torch.zeros_like(self.logits)
        self.pool, self.cross_pool, self.workspace = s.pool, s.cross_pool, s.workspace
        heads = decoder.cross_num_attention_heads
        self.cross_workspace = ops.attention_workspace(
            steps * batch, heads, decoder.cross_head_dim, s.sizes.text, device
        )
        self.parts = [
            Attended(
                self._by_step(self.qkv)[j, branch], s.table[branch * batch : (branch + 1) * batch],
                self._by_step(self.positions)[j, branch], self._by_step(self.attended)[j, branch], j == 0,
            )
            for j in range(steps) for branch in range(self.branches)
        ]  # fmt: skip

    def begin(self, s: DecodeState) -> None:
        """Take over the texts, and forget earlier faults."""
        self.cross_table.view(self.steps, *s.cross_table.shape).copy_(s.cross_table)
        self.text_lengths.view(self.steps, -1).copy_(s.text_lengths)
        self.status.zero_()

    def take(self, j: int, s: DecodeState) -> None:
        """Keep what `embed_codes` made of the `j`th step."""
        self._by_step(self.x)[j].copy_(s.x.view(self.branches, self.batch, -1))
        self._by_step(self.positions)[j].copy_(s.positions.view(self.branches, -1))
        for name in ("step", "eos_step", "finished"):
            getattr(self, name)[j].copy_(getattr(s, name))

    def order_logits(self) -> None:
        """Bring the logits into the order of the steps."""
        if self.guided:
            self.logits.view(self.steps, self.branches, self.batch, *self.logits.shape[2:]).copy_(
                self._by_step(self.flat_logits)
            )

    def keep(self, s: DecodeState, count: Tensor) -> None:
        """Put the state to where it was after the step `count[b]` of each request, as if there had been no others."""
        at = count.long().clamp(0, self.steps - 1)[None]
        for name in ("step", "eos_step", "finished"):
            getattr(s, name).copy_(getattr(self, name).gather(0, at)[0])
        s.sampled.copy_(self.chosen.gather(0, at[..., None].expand(1, *s.sampled.shape))[0])
        for j, status in enumerate(self.status):
            s.status.copy_(torch.where((s.status == 0) & (at[0] >= j)[:, None], status, s.status))

    def _by_step(self, rows: Tensor) -> Tensor:
        """`[branches * steps * batch, ...]` as `[steps, branches, batch, ...]`; a copy is made by whoever flattens."""
        return rows.view(self.branches, self.steps, self.batch, *rows.shape[1:]).transpose(0, 1)
