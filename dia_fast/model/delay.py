"""The delayed grid: channel `c` speaks frame `t` in row `t + 1 + delay[c]`, after a first row of BOS.

A frame is one code per channel for the same 11.6 ms; a row is what the decoder reads or writes in one step. Source: the
delay pattern of MusicGen (Copet et al. 2023); Dia's is in its configuration.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FREE = -1  # an entry of the grid that nothing defines yet: the model fills it


def delayed_rows(frames: Tensor, delay: Sequence[int], bos: int) -> Tensor:
    """The part of the grid that an audio prompt determines: `[frames + max(delay) + 1, channels]` int32.

    frames: `[frames, channels]` integer codes, no rows for none. Entries before a channel starts are `bos`, entries
    after the last given frame are `FREE`: none in rows `0 .. frames - 1`, none in channel 0 of row `frames`.
    """
    total = frames.shape[0]
    rows = torch.full((total + max(delay) + 1, len(delay)), FREE, dtype=torch.int32, device="cpu")
    for channel, late in enumerate(delay):
        rows[: late + 1, channel] = bos
        rows[late + 1 : late + 1 + total, channel] = frames[:, channel].to(rows)
    return rows


def undo_delay(rows: Tensor, delay: Sequence[int], eos: int) -> Tensor:
    """The frames that the grid holds completely: `[frames, channels]` int64, every code in `0 .. eos - 1`.

    rows: `[rows, channels]` from row 0 on. The row with `eos` in channel 0, if any, ends the speech; what comes before
    it is whole. Without one, the last `max(delay)` rows only complete earlier frames. A code from `eos` on is no sound;
    should one turn up, it becomes 0, as in the original package.
    """
    ended = (rows[:, 0] == eos).nonzero()
    total = rows.shape[0] - max(delay)
    if ended.numel():
        total = min(total, int(ended[0]))
    total = max(total - 1, 0)
    columns = [rows[late + 1 : late + 1 + total, channel] for channel, late in enumerate(delay)]
    frames = torch.stack(columns, dim=1).to(torch.int64)
    return frames.masked_fill((frames < 0) | (frames >= eos), 0)
