"""Size of the page pools, from the requests and the memory that is free."""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from dia_fast.engine.request import Plan
from dia_fast.errors import InputError
from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import Sizes, cross_pages, self_pages

_MEMINFO = "/proc/meminfo"
_SHARE_FOR_TEXT = 0.4  # of the memory for pages: what a text of 1024 bytes takes beside 3072 steps of sound


def sizes_for_any(
    config: DiaConfig, max_batch: int, memory: int | None, dtype: torch.dtype, device: torch.device
) -> Sizes:
    """Room for `max_batch` requests of any kind, in at most `memory` bytes of pages.

    Args:
        memory: None is as much as the requests could ever need, but no more than half of what is free.

    Raises:
        InputError: If it does not hold one request of one page.
    """
    decoder, encoder = config.decoder, config.encoder
    sound, text = self_pages(config), cross_pages(config)
    steps = decoder.max_position_embeddings + 1
    pages = 2 * max_batch * sound.pages(steps)
    text_pages = max_batch * text.pages(encoder.max_position_embeddings)
    limit = free_memory(device) // 2 if memory is None else memory
    if pages * sound.bytes(dtype) + text_pages * text.bytes(dtype) > limit:
        text_pages = min(text_pages, int(limit * _SHARE_FOR_TEXT) // text.bytes(dtype))
        pages = min(pages, (limit - text_pages * text.bytes(dtype)) // sound.bytes(dtype))
        if pages < 2 or text_pages < 1:
            least = 2 * sound.bytes(dtype) + int(text.bytes(dtype) / _SHARE_FOR_TEXT)
            raise InputError(f"memory: {limit} bytes hold no request; give at least {least}, and some hundred MB more")
    return Sizes(max_batch, True, steps, encoder.max_position_embeddings, pages, text_pages)


def sizes_for(
    config: DiaConfig, plans: Sequence[Plan], max_batch: int, dtype: torch.dtype, device: torch.device
) -> Sizes:
    """Room for these requests, the `max_batch` longest of them at once, within half of the free memory."""
    guided = any(item.guided for item in plans)
    branches = 2 if guided else 1
    text = cross_pages(config)
    longest = sorted((item.end + 1 for item in plans), reverse=True)
    texts = sorted((len(item.request.text_ids) for item in plans), reverse=True)
    wanted = Sizes(
        batch=min(len(plans), max_batch),
        guided=guided,
        steps=longest[0],
        text=texts[0],
        pages=branches * sum(self_pages(config).pages(steps) for steps in longest[:max_batch]),
        text_pages=sum(text.pages(length) for length in texts[:max_batch]),
    )
    limit = sizes_for_any(config, max_batch, None, dtype, device)
    least = text.pages(texts[0])
    return replace(
        wanted, pages=min(wanted.pages, limit.pages), text_pages=max(min(wanted.text_pages, limit.text_pages), least)
    )


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated there now.

    On a GPU what torch's allocator holds without using it counts as free; on a CPU what the system keeps in its cache
    of files does.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    try:
        with open(_MEMINFO, encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):  # not Linux, or not as we know it
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, AttributeError, OSError):  # not every system tells
        return 4 << 30
