"""From the codes sampled in the last step to the next decoder input."""

import torch
from torch import Tensor


def embed_codes(
    sampled: Tensor,
    forced: Tensor,
    row: Tensor,
    first_row: Tensor,
    end_row: Tensor,
    eos_row: Tensor,
    delay: Tensor,
    table: Tensor,
    codes: Tensor,
    positions: Tensor,
    finished: Tensor,
    x: Tensor,
    *,
    eos: int,
    pad: int,
) -> Tensor:
    """Forms the next row of the delayed grid and embeds it. In place, for every slot `b` of `batch`:

    - `r = row[b]`. A slot with `r < 0` or `finished[b] != 0` is inert: its positions become -1, its rows of `x`
      become 0, and nothing else of it changes.
    - the code of channel `c` is `forced[b, r - first_row[b], c]` where that exists and is `>= 0`, else `sampled[b, c]`;
      one outside the table is brought to its nearest end, 0 or `vocab - 1`;
    - if `eos_row[b] < 0` and `r > first_row[b]`: when `r == end_row[b] - max(delay)` channel 0 becomes `eos`;
      when channel 0 is `eos`, `eos_row[b] = r`;
    - if `eos_row[b] >= 0`: channel `c` becomes `eos` at `r == eos_row[b] + delay[c]`, `pad` after it;
    - `codes[b, r] = ` the nine codes; `finished[b] = 1` when `r >= end_row[b]` or (`eos_row[b] >= 0` and
      `r >= eos_row[b] + max(delay)`); `row[b] = r + 1`;
    - rows `b` and, if `rows == 2 * batch`, `batch + b`: `positions = r`, `x = sum_c table[c * vocab + code_c]`
      summed in fp32 in channel order, rounded once.

    sampled: `[batch, channels]` int32, from `sample`; forced: `[batch, depth, channels]` int32, -1 where free;
    row, first_row, end_row, eos_row, finished: `[batch]` int32; delay: `[channels]` int32, `delay[0] == 0`;
    table: `[channels * vocab, hidden]`; codes: `[batch, capacity, channels]` int32 with `capacity > end_row`;
    positions: `[rows]` int32; x: `[rows, hidden]`; rows is batch or 2 * batch. Returns `x`.
    Source: the delay pattern of MusicGen (Copet et al. 2023) with Dia's EOS countdown (docs/dia.md, "Delay pattern").
    """
    batch, channels = sampled.shape
    vocab = table.shape[0] // channels
    max_delay = delay.max()
    active = (row >= 0) & (finished == 0)
    r = row.clamp(min=0)
    depth = (r - first_row).long()
    in_forced = (depth >= 0) & (depth < forced.shape[1])
    lookup = forced[torch.arange(batch, device=row.device, dtype=torch.int64), depth.clamp(0, forced.shape[1] - 1)]
    code = torch.where(in_forced[:, None] & (lookup >= 0), lookup, sampled).clamp(0, vocab - 1)

    open_ended = active & (eos_row < 0) & (r > first_row)
    code[:, 0] = torch.where(open_ended & (r == end_row - max_delay), eos, code[:, 0])
    eos_row.copy_(torch.where(open_ended & (code[:, 0] == eos), r, eos_row))
    past_eos = (r - eos_row)[:, None] - delay
    ended = (eos_row >= 0)[:, None]
    code = torch.where(ended & (past_eos == 0), eos, torch.where(ended & (past_eos > 0), pad, code))

    at = r.long().clamp(max=codes.shape[1] - 1)
    lanes = torch.arange(batch, device=row.device, dtype=torch.int64)
    codes[lanes, at] = torch.where(active[:, None], code, codes[lanes, at])
    done = (r >= end_row) | ((eos_row >= 0) & (r >= eos_row + max_delay))
    finished.copy_(torch.where(active & done, 1, finished))
    row.copy_(torch.where(active, r + 1, row))

    index = (
        torch.where(active[:, None], code, 0).long()
        + torch.arange(channels, device=row.device, dtype=torch.int64) * vocab
    )
    total = table[index[:, 0]].float()
    for channel in range(1, channels):
        total += table[index[:, channel]]
    total *= active[:, None]
    positions.view(-1, batch).copy_(torch.where(active, r, -1))
    x.view(-1, batch, x.shape[-1]).copy_(total)
    return x
