"""Long scripts: cut into segments that the model speaks well, and the sound of the segments put together again.

The model was trained on 5 to 20 s of speech. A script that takes longer is cut at speaker turns; a long turn at
sentence ends; a sentence that is too long for a segment at commas, a clause at spaces, a word (or a text that is
written without spaces) between characters. Nothing is cut inside a tag or a sound such as `(laughs)`.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dia_fast.audio.audio import Samples
from dia_fast.errors import InputError
from dia_fast.text.tokenizer import MAX_BYTES, TAG, checked_text, spoken_seconds
from dia_fast.utils.values import real_number, whole_number

SEGMENT_SECONDS = 12.0
"""Longest segment. Two of them, one as the voice of the other, must fit in the model's 35 s even if spoken slowly."""
LEAST_SECONDS = 1.0 / 3
"""Shortest limit that a segment can be given: five characters."""
FADE_SECONDS = 0.01
TRAILING = re.compile(rf"(?:\s*{TAG.pattern})+\s*\Z")
"""Tags after the last word."""

_OTHER = {"[S1]": "[S2]", "[S2]": "[S1]"}

_GOAL = 0.75  # of the longest: segments of about 9 s
_SHORT = 0.4  # of the longest: what is shorter sounds hurried
# What it costs to cut there: at a turn, a sentence end, a comma, a space, inside a word. Beside it, a segment costs the
# square of its deviation from the goal, in goals, and up to 2 for being short.
_CUT = (0.0, 0.1, 0.5, 1.0, 4.0)
_TURN, _SENTENCE, _CLAUSE, _SPACE, _LETTER = range(5)

# Kept in one segment: (clears throat), [whatever], but not a whole sentence in brackets.
_TOGETHER = re.compile(r"\([^()]{1,40}\)|\[[^\[\]]{1,40}\]")
_CLOSING = "\"')]}»”’"
_ENDS_SENTENCE = re.compile(rf"[.!?…]+[{re.escape(_CLOSING)}]*\Z")
_ENDS_CLAUSE = re.compile(rf"[,;:–—-]+[{re.escape(_CLOSING)}]*\Z")
_ABBREVIATION = re.compile(r"(?:\A|[\s(])(?:[A-Z]|Mrs?|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|[ei]\.[eg])\.\Z")
# Scripts without spaces.
_WIDE_SENTENCE = re.compile(r"[。！？｡]+[」』）”’]*")
_WIDE_CLAUSE = re.compile(r"[、，；：､]+")


def split_script(
    text: str | bytes, *, max_seconds: float = SEGMENT_SECONDS, max_bytes: int = MAX_BYTES // 2
) -> list[str]:
    """Segments of a script, each beginning with its speaker's tag, as in `"[S1] words [S2] words"`.

    All words are there, in their order; a run of white space becomes one space. Words before the first tag are given to
    [S1]. Turns of the same speaker that follow each other become one, so tags alternate within a segment. Each segment
    takes at most `max_seconds` (by `spoken_seconds`) and `max_bytes` of the model's text; among the ways to cut, the
    one with the most even segments and the least harm is taken. A tag that ends the script, so that its last words are
    not clipped, ends each segment: that of the segment's last speaker if it is the script's, else the other one.

    Raises:
        InputError: As `checked_text` does, and for limits that no segment could keep to.
    """
    max_seconds, max_bytes = real_number("max_seconds", max_seconds), whole_number("max_bytes", max_bytes, 0)
    if not LEAST_SECONDS <= max_seconds < math.inf or max_bytes < 16:
        raise InputError(f"segments of {max_seconds:.2f} s and {max_bytes} bytes: no word fits; at least 0.33 s and 16")
    text = checked_text(text)
    turns, trailing = _turns(text), TRAILING.search(text)
    same = trailing is not None and TAG.findall(trailing[0])[-1] == turns[-1][0]
    limit = _Limit(max_seconds, max_bytes)
    if trailing is not None:
        limit = _Limit(max_seconds - spoken_seconds(" "), max_bytes - 2)
    blocks = [block for number, (_, words) in enumerate(turns) for block in _blocks(number, words, limit)]
    segments = [_text(turns, blocks[first:last]) for first, last in _best_cuts(turns, blocks, limit)]
    if trailing is None:
        return segments
    last = [TAG.findall(segment)[-1] for segment in segments]
    return [f"{segment} {tag if same else _OTHER[tag]}" for segment, tag in zip(segments, last, strict=True)]


def speakers(text: str) -> set[str]:
    """The tags of those who say something; a tag that ends the text is none."""
    return set(TAG.findall(TRAILING.sub("", text)))


def continued(*parts: str) -> str:
    """Transcripts of audio prompts, and last the words to speak next, as the model should read them.

    A speaker who goes on gets no second tag. A text that would begin with [S2] has its speakers swapped: the model
    knows them by the order in which they appear, and has only read texts that begin with [S1].
    """
    joined = ""
    *before, last = map(str.strip, parts)
    for part in [*(TRAILING.sub("", part) for part in before), last]:
        tags = TAG.findall(joined)
        if tags and part.startswith(tags[-1]):
            part = part.removeprefix(tags[-1]).lstrip()
        joined = f"{joined} {part}".strip()
    if joined.startswith("[S2]"):
        joined = TAG.sub(lambda tag: _OTHER[tag[0]], joined)
    return joined


def fade_in(count: int) -> Samples:
    """A raised cosine from 0 towards 1, `[count]` float32; backwards it fades out."""
    ramp: Samples = (0.5 - 0.5 * np.cos(np.pi * np.arange(count) / max(count, 1))).astype(np.float32)
    return ramp


def sentence_ends(text: str) -> list[int]:
    """Indices behind the white space that follows each sentence, by the rules of `split_script`.

    The end of the text is none of them: more may come.
    """
    inside = [False] * len(text)
    for match in _TOGETHER.finditer(text):
        inside[match.start() : match.end()] = [True] * len(match[0])
    found = []
    for gap in re.finditer(r"\s+", text):
        before = text[max(0, gap.start() - 24) : gap.start()]
        if not inside[gap.start()] and _ENDS_SENTENCE.search(before) and not _ABBREVIATION.search(before):
            found.append(gap.end())
    return found + [match.end() for match in _WIDE_SENTENCE.finditer(text) if match.end() < len(text)]


class JoinedSegments:
    """Segments one after the other, as they come, in memory that grows where it lies: each sample is held once.

    Where two meet, the first fades out and the second in (raised cosine, at most half of the segment): the sound passes
    through zero without a click, and is nowhere louder than the segments. A single segment stays as it is.

    Args:
        sample_rate: Of the segments.
        fade_seconds: Of each fade.
    """

    def __init__(self, sample_rate: int, fade_seconds: float = FADE_SECONDS) -> None:
        self._fade = round(fade_seconds * sample_rate)
        self._samples: Samples = np.zeros(0, np.float32)
        self._count = self._last = 0  # samples so far, and those of the last segment
        self._grows = False  # the memory is ours: the first segment stays where it is until there is another one

    def add(self, segment: Samples) -> None:
        """Put a segment, float32 `[n]`, behind those before; one without samples changes nothing."""
        first, end = self._count, self._count + len(segment)
        if first == 0:
            self._samples = segment
        elif len(segment):
            self._make_room(end)
            self._samples[first:end] = segment
            before, after = min(self._fade, self._last // 2), min(self._fade, len(segment) // 2)
            self._samples[first - before : first] *= fade_in(before)[::-1]
            self._samples[first : first + after] *= fade_in(after)
        self._count, self._last = end, len(segment) or self._last

    def _make_room(self, count: int) -> None:
        if not self._grows:
            self._samples, self._grows = np.array(self._samples[: self._count], dtype=np.float32), True
        if count > len(self._samples):
            self._samples.resize(max(count, len(self._samples) * 9 // 8), refcheck=False)

    def samples(self) -> Samples:
        """All of them, float32 `[sum of n]`; nothing can be added afterwards."""
        if self._grows:
            self._samples.resize(self._count, refcheck=False)
        return self._samples


def join_segments(segments: Iterable[Samples], sample_rate: int, *, fade_seconds: float = FADE_SECONDS) -> Samples:
    """The segments one after the other, float32 `[sum of n]`, see `JoinedSegments`; a single one is itself returned."""
    joined = JoinedSegments(sample_rate, fade_seconds)
    for segment in segments:
        joined.add(segment)
    return joined.samples()


@dataclass(frozen=True)
class _Limit:
    seconds: float
    size: int

    def holds(self, words: str) -> bool:
        """Tell whether words fit in a segment of their own, with a tag and a space."""
        return spoken_seconds(words) + spoken_seconds(" ") <= self.seconds and len(words.encode()) + 2 <= self.size


@dataclass(frozen=True)
class _Block:
    """`words[start:end]` of a turn, not to be cut; `level` of the cut before it; length and bytes up to the next."""

    turn: int
    start: int
    end: int
    level: int
    seconds: float
    size: int


def _turns(text: str) -> list[tuple[str, str]]:
    """(tag, words) of each turn; the speakers alternate. A blank line in the words stays as a line feed."""
    parts = ["[S1]", *re.split(rf"({TAG.pattern})", text)]
    turns: list[tuple[str, str]] = []
    for tag, said in zip(parts[::2], parts[1::2], strict=True):
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n[^\S\n]*\n", said))
        words = "\n".join(part for part in paragraphs if part)
        if words and turns and turns[-1][0] == tag:
            turns[-1] = tag, f"{turns[-1][1]} {words}"
        elif words:
            turns.append((tag, words))
    return turns


def _blocks(turn: int, words: str, limit: _Limit) -> list[_Block]:
    cuts = list(_cuts(words, limit))
    blocks = []
    for (start, level), (following, _) in zip(cuts, [*cuts[1:], (len(words), 0)], strict=True):
        end = start + len(words[start:following].rstrip())
        said = words[start:following] + ("  " if start == 0 else "")  # with the spaces around its tag
        blocks.append(_Block(turn, start, end, level, spoken_seconds(said), len(said.encode()) + (start == 0)))
    return blocks


def _cuts(words: str, limit: _Limit) -> Iterator[tuple[int, int]]:
    """(index, level) of where blocks begin, the first at 0: as few cuts of high levels as the limit allows."""
    together = [match.span() for match in _TOGETHER.finditer(words)]
    levels = dict(_breaks(words, together))
    goal = _Limit(_GOAL * limit.seconds, limit.size)

    def divide(start: int, end: int, level: int) -> Iterator[tuple[int, int]]:
        # Between sentences a turn may be cut already when it is long, for the sake of what stands around it.
        if (goal if level == _SENTENCE else limit).holds(words[start:end].strip()):
            return
        if level == _LETTER:
            yield from _letter_cuts(words, start, end, together, limit)
            return
        inner = [index for index, found in levels.items() if start < index < end and found == level]
        for first, last in zip([start, *inner], [*inner, end], strict=True):
            if first > start:
                yield first, level
            yield from divide(first, last, level + 1)

    yield 0, _TURN
    yield from divide(0, len(words), _SENTENCE)


def _breaks(words: str, together: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(index, level) of every place where words may be cut without breaking one, in order. Cuts go after a space."""
    inside = {index for first, last in together for index in range(first + 1, last)}
    for match in re.finditer(rf"[ \n]|{_WIDE_SENTENCE.pattern}|{_WIDE_CLAUSE.pattern}", words):
        index = match.end()
        if index in inside or index == len(words):
            continue
        if match[0] == "\n" or _WIDE_SENTENCE.fullmatch(match[0]):
            yield index, _SENTENCE
        elif match[0] != " ":
            yield index, _CLAUSE
        else:
            before = words[max(0, index - 20) : index - 1]
            if _ENDS_SENTENCE.search(before) and not _ABBREVIATION.search(before) and not words[index].islower():
                yield index, _SENTENCE
            else:
                yield index, _CLAUSE if _ENDS_CLAUSE.search(before) else _SPACE


def _letter_cuts(
    words: str, start: int, end: int, together: list[tuple[int, int]], limit: _Limit
) -> Iterator[tuple[int, int]]:
    """Cut of one endless word: as late as possible, between characters as a reader sees them if there are any."""
    end = start + len(words[start:end].rstrip())  # a space alone is no segment
    sounds = {index for first, last in together for index in range(first + 1, last)}
    while not limit.holds(words[start:end]):
        low, high = start + 1, end
        while low < high:  # the last index up to which it fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if limit.holds(words[start:middle]) else (low, middle - 1)
        good = (index for index in range(low, start, -1) if index not in sounds and not _joined(words, index))
        start = next(good, low)
        yield start, _LETTER


def _joined(words: str, index: int) -> bool:
    """Tell whether the code points before and after `index` belong to one visible character (a part of UAX 29)."""
    before, after = words[index - 1], words[index]
    letters = 0  # two make a flag
    while index > letters and "\U0001f1e6" <= words[index - letters - 1] <= "\U0001f1ff":
        letters += 1
    flags = letters % 2 == 1 and "\U0001f1e6" <= after <= "\U0001f1ff"
    jamo = 0x1100 <= ord(before) <= 0xD7A3 and 0x1160 <= ord(after) <= 0x11FF
    return (
        unicodedata.category(after).startswith("M")
        or "\u200d" in (before, after)
        or 0x1F3FB <= ord(after) <= 0x1F3FF
        or flags
        or jamo
    )


def _best_cuts(turns: list[tuple[str, str]], blocks: list[_Block], limit: _Limit) -> list[tuple[int, int]]:
    """(first, end) block of each segment: the cheapest cuts, by dynamic programming over the last segment."""
    goal, short = _GOAL * limit.seconds, _SHORT * limit.seconds
    cheapest = [0.0]
    came_from = [0]
    for end in range(1, len(blocks) + 1):
        seconds, size, best, origin = 0.0, 0, float("inf"), end - 1
        for first in range(end - 1, -1, -1):
            seconds += blocks[first].seconds
            size += blocks[first].size
            # A block fits alone. A segment that begins within a turn has one more tag and space than its blocks.
            if first < end - 1 and (seconds + spoken_seconds(" ") > limit.seconds or size + 2 > limit.size):
                break
            cost = ((seconds - goal) / goal) ** 2 + 2 * max(0.0, 1 - seconds / short)
            cost += cheapest[first] + (_CUT[blocks[first].level] if first else 0.0)
            if cost < best:
                best, origin = cost, first
        cheapest.append(best)
        came_from.append(origin)
    segments = []
    end = len(blocks)
    while end:
        segments.append((came_from[end], end))
        end = came_from[end]
    return segments[::-1]


def _text(turns: list[tuple[str, str]], blocks: Sequence[_Block]) -> str:
    """Blocks that follow each other, as a text with tags."""
    said: dict[int, tuple[int, int]] = {}
    for block in blocks:
        said[block.turn] = said.get(block.turn, (block.start, 0))[0], block.end
    parts = (f"{turns[turn][0]} {turns[turn][1][start:end]}" for turn, (start, end) in said.items())
    return " ".join(parts).replace("\n", " ")
