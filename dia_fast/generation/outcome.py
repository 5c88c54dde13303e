"""The outcome of a text: one object for every door, and the seeds with which silence is tried again."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

FinishReason = Literal["end", "length", "silent"]
Status = Literal["done", "partial", "failed"]


@dataclass(frozen=True)
class Segment:
    """One segment of a text: all of a short one.

    Args:
        text: Its words.
        finish_reason: `"end"`, the model ended it; `"length"`, a limit did; `"silent"`, the model ended it before its
            first frame, so no code of sound exists.
        frames: Of the codec.
        seeds: Of all attempts, the one used last.
    """

    text: str
    finish_reason: FinishReason
    frames: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a text.

    Args:
        segments: In their order.
        warnings: Remarks, one sentence each.
    """

    segments: tuple[Segment, ...]
    warnings: tuple[str, ...] = ()

    @property
    def finish_reason(self) -> FinishReason:
        """The worst of the segments: `"silent"`, then `"length"`, then `"end"`."""
        reasons = {segment.finish_reason for segment in self.segments}
        return "silent" if "silent" in reasons else "length" if "length" in reasons else "end"

    @property
    def status(self) -> Status:
        """`"failed"` if every segment is silent, `"partial"` if some are, else `"done"`."""
        silent = len(self.silent)
        return "done" if not silent else "failed" if silent == len(self.segments) else "partial"

    @property
    def silent(self) -> tuple[int, ...]:
        """Numbers of the silent segments, from 0."""
        return tuple(index for index, item in enumerate(self.segments) if item.finish_reason == "silent")

    def described(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"finish_reason": self.finish_reason, **asdict(self)}


def finish_reason(frames: int, truncated: bool) -> FinishReason:
    """Name the reason why a segment ended. Without a frame it is silent, whatever ended it."""
    return "silent" if not frames else "length" if truncated else "end"


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of an attempt: the segment's own, then the first 63 bits of SHA-256 of "seed/retry/attempt"."""
    if attempt == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/retry/{attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def silence(attempts: int) -> str:
    """The remark about a silent segment."""
    tried = "" if attempts == 1 else f", with each of {attempts} seeds"
    return f"the model ended the speech before it began{tried}: its words are missing; try another seed or text"
