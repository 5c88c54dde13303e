"""From the codes sampled in the last step to the next decoder input."""

import torch
from torch import Tensor


def embed_codes(
    sampled: Tensor,
    prompt_codes: Tensor,
    step: Tensor,
    first_step: Tensor,
    end_step: Tensor,
    eos_step: Tensor,
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
    """Form the next delayed codes and embed them. In place, for every request `b` of `batch`.

    - `r = step[b]`. A request with `r < 0` or `finished[b] != 0` is inert: its positions become -1, its rows of `x`
      become 0, and nothing else of it changes.
    - the code of channel `c` is `prompt_codes[b, r - first_step[b], c]` where that exists and is `>= 0`, else
      `sampled[b, c]`; one outside the table is brought to its nearest end, 0 or `vocab - 1`;
    - if `eos_step[b] < 0` and `r > first_step[b]`: when `r == end_step[b] - max(delay)` channel 0 becomes `eos`;
      when channel 0 is `eos`, `eos_step[b] = r`;
    - if `eos_step[b] >= 0`: channel `c` becomes `eos` at `r == eos_step[b] + delay[c]`, `pad` after it;
    - `codes[b, r] = ` the nine codes; `finished[b] = 1` when `r >= end_step[b]` or (`eos_step[b] >= 0` and
      `r >= eos_step[b] + max(delay)`); `step[b] = r + 1`;
    - rows `b` and, if `rows == 2 * batch`, `batch + b`: `positions = r`, `x = sum_c table[c * vocab + code_c]`
      summed in fp32 in channel order, rounded once.

    Source: the delay pattern of MusicGen (Copet et al. 2023) with Dia's EOS countdown (docs/dia.md, "Delay pattern").

    Args:
        sampled: `[batch, channels]` int32, from `sample`.
        prompt_codes: `[batch, depth, channels]` int32, -1 where free.
        step: `[batch]` int32, updated.
        first_step: `[batch]` int32.
        end_step: `[batch]` int32.
        eos_step: `[batch]` int32, updated.
        delay: `[channels]` int32, `delay[0] == 0`.
        table: `[channels * vocab, hidden]`.
        codes: `[batch, capacity, channels]` int32 with `capacity > end_step`, written.
        positions: `[rows]` int32, written; rows is batch or 2 * batch.
        finished: `[batch]` int32, updated.
        x: `[rows, hidden]`, written.
        eos: Code that ends a channel.
        pad: Code behind it.

    Returns:
        `x`.

    Raises:
        ValueError: On the Triton op set, a shape, layout or device that the kernel does not take; the message names it.
        TypeError: On the Triton op set, a dtype that the kernel does not take.
    """
    batch, channels = sampled.shape
    vocab = table.shape[0] // channels
    max_delay = delay.max()
    active = (step >= 0) & (finished == 0)
    current = step.clamp(min=0)
    depth = (current - first_step).long()
    in_prompt = (depth >= 0) & (depth < prompt_codes.shape[1])
    lookup = prompt_codes[
        torch.arange(batch, device=step.device, dtype=torch.int64), depth.clamp(0, prompt_codes.shape[1] - 1)
    ]
    code = torch.where(in_prompt[:, None] & (lookup >= 0), lookup, sampled).clamp(0, vocab - 1)

    open_ended = active & (eos_step < 0) & (current > first_step)
    code[:, 0] = torch.where(open_ended & (current == end_step - max_delay), eos, code[:, 0])
    eos_step.copy_(torch.where(open_ended & (code[:, 0] == eos), current, eos_step))
    past_eos = (current - eos_step)[:, None] - delay
    ended = (eos_step >= 0)[:, None]
    code = torch.where(ended & (past_eos == 0), eos, torch.where(ended & (past_eos > 0), pad, code))

    at = current.long().clamp(max=codes.shape[1] - 1)
    batch_idx = torch.arange(batch, device=step.device, dtype=torch.int64)
    codes[batch_idx, at] = torch.where(active[:, None], code, codes[batch_idx, at])
    done = (current >= end_step) | ((eos_step >= 0) & (current >= eos_step + max_delay))
    finished.copy_(torch.where(active & done, 1, finished))
    step.copy_(torch.where(active, current + 1, step))

    index = (
        torch.where(active[:, None], code, 0).long()
        + torch.arange(channels, device=step.device, dtype=torch.int64) * vocab
    )
    total = table[index[:, 0]].float()
    for channel in range(1, channels):
        total += table[index[:, channel]]
    total *= active[:, None]
    positions.view(-1, batch).copy_(torch.where(active, current, -1))
    x.view(-1, batch, x.shape[-1]).copy_(total)
    return x
