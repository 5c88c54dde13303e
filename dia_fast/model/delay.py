"""Delayed codes: channel `c` speaks frame `t` in step `t + 1 + delay[c]`, after a step 0 of BOS.

A frame is one code per channel for the same 11.6 ms; the decoder reads and writes one code per channel in a step.
Source: the delay pattern of MusicGen (Copet et al. 2023); Dia's is in its configuration.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FREE = -1  # a delayed code that nothing defines yet: the model fills it


def apply_delay(frames: Tensor, delay: Sequence[int], bos: int) -> Tensor:
    """Delay the frames of an audio prompt.

    Args:
        frames: `[frames, channels]` integer codes, of length 0 for none.
        delay: Of each channel, in steps.
        bos: The code before a channel starts.

    Returns:
        `[frames + max(delay) + 1, channels]` int32. Codes after the last given frame are `FREE`: none in steps
        `0 .. frames - 1`, none in channel 0 of step `frames`.
    """
    total = frames.shape[0]
    codes = torch.full((total + max(delay) + 1, len(delay)), FREE, dtype=torch.int32, device="cpu")
    for channel, late in enumerate(delay):
        codes[: late + 1, channel] = bos
        codes[late + 1 : late + 1 + total, channel] = frames[:, channel].to(codes)
    return codes


def undo_delay(codes: Tensor, delay: Sequence[int], eos: int) -> Tensor:
    """The frames that are complete: `[frames, channels]` int64, every code in `0 .. eos - 1`.

    Args:
        codes: `[steps, channels]` from step 0 on. The step with `eos` in channel 0, if any, ends the speech; what comes
            before it is whole. Without one, the last `max(delay)` steps only complete earlier frames. A code from `eos`
            on is no sound; should one turn up, it becomes 0, as in the original package.
    """
    ended = (codes[:, 0] == eos).nonzero()
    total = codes.shape[0] - max(delay)
    if ended.numel():
        total = min(total, int(ended[0]))
    total = max(total - 1, 0)
    columns = [codes[late + 1 : late + 1 + total, channel] for channel, late in enumerate(delay)]
    frames = torch.stack(columns, dim=1).to(torch.int64)
    return frames.masked_fill((frames < 0) | (frames >= eos), 0)
