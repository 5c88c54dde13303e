"""What callers of `Dia` may pass, checked and brought into one form."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from dia_fast.engine import MAX_BATCH
from dia_fast.errors import InputError
from dia_fast.progress import StepBar
from dia_fast.prompts import AudioPrompt
from dia_fast.settings import SamplingSettings, random_seed

if TYPE_CHECKING:
    from dia_fast.codec import Codec

Texts: TypeAlias = str | bytes | Sequence[str | bytes]
Prompts: TypeAlias = AudioPrompt | list[AudioPrompt]
Seeds: TypeAlias = int | Sequence[int] | None
Progress: TypeAlias = bool | Callable[[int], None]
AnyCodec: TypeAlias = "str | os.PathLike[str] | Codec | None"
Memory: TypeAlias = int | str | None

FRAMES_PER_SECOND = 44_100 / 512  # of the codec that Dia was trained on

_POWERS = ("", "K", "M", "G", "T")  # of 1000, or of 1024 as in KiB


def check_codec(codec: object) -> None:
    """Raises InputError unless it is the name or path of a codec, a loaded one, or None."""
    if codec is None or isinstance(codec, str | os.PathLike):
        return
    from dia_fast.codec import Codec

    if not isinstance(codec, Codec):
        raise InputError(f"codec must be the name or path of one, a loaded Codec, or None, not {codec!r:.40}")


def is_list(text: Texts) -> bool:
    return isinstance(text, list | tuple)


def texts_of(text: Texts) -> list[str | bytes]:
    """One text or several, as a list. Raises InputError for an empty one."""
    if not is_list(text):
        return [text]  # type: ignore[list-item]
    if not text:
        raise InputError("text is an empty list: there is nothing to say")
    return list(text)  # type: ignore[arg-type]


def seeds_of(seed: Seeds, count: int, settings: SamplingSettings) -> list[int | None]:
    """A checked seed for each text."""
    if seed is None:
        return [random_seed() for _ in range(count)]
    given: list[Any] = list(seed) if isinstance(seed, list | tuple) else [seed] * count
    if len(given) != count:
        raise InputError(f"seed has {len(given)} entries for {count} texts: give one for each, or one int for all")
    return [replace(settings, seed=random_seed() if item is None else item).seed for item in given]


def progress_of(progress: Progress, total: int) -> Any:
    """A context whose value is what to call with the number of steps so far, or None. total: steps at the limit."""
    if callable(progress):
        return nullcontext(progress)
    if not isinstance(progress, bool):
        raise InputError(f"progress must be True, False or a function of the number of steps, not {progress!r}")
    return StepBar(total, FRAMES_PER_SECOND) if progress else nullcontext(None)


def engine_limits(max_batch: int, memory: Memory) -> dict[str, Any]:
    """Checked arguments of an `Engine`: memory in bytes, from a number of them or a text such as "4GB" or "512 MiB"."""
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or not 1 <= max_batch <= MAX_BATCH:
        raise InputError(f"max_batch must be from 1 to {MAX_BATCH}, not {max_batch!r:.40}")
    return {"max_batch": max_batch, "memory": _bytes(memory)}


def _bytes(memory: Memory) -> int | None:
    if memory is None:
        return None
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", memory.upper())
        if found and (found[2] or not found[3]):
            memory = int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS.index(found[2]))
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 1:
        raise InputError(f'memory must be a number of bytes, or a text such as "4GB" or "512MB", not {memory!r:.40}')
    return memory
