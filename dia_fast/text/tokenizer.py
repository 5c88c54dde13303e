"""A transcript becomes a list of bytes: UTF-8, with one id for each speaker tag.

`[S1]` is id 1 and `[S2]` is id 2; id 0 pads. Nothing is put in front or behind. What cannot work is an `InputError`;
what is known to sound bad is a `TextWarning` and goes on.
"""

import math
import re

from dia_fast.errors import InputError
from dia_fast.utils.values import real_number, whole_number
from dia_fast.utils.warn import warn

SPEAKER_IDS = {"[S1]": 1, "[S2]": 2}
MAX_BYTES = 1024
"""Bytes the model reads, tags counted as one each: the encoder's positions."""
ABSURD_BYTES = 1 << 16
"""A longer text is taken for a mistake (a book, a binary file) instead of being cut to its first 1024 bytes."""

GOOD_SECONDS = 20
"""The authors' advice; longer texts are spoken hastily and stray from the script."""
TAG = re.compile(r"\[S[12]\]")

SHORT_SECONDS = 5
"""The authors' advice; shorter texts sound unnatural."""
MOST_SOUNDS = 2  # in brackets, in one sentence

CHARACTERS_PER_SECOND = 15  # unhurried English
_LOOKS_LIKE_TAG = re.compile(r"\[\s*[sS](?:peaker)?\s*\d+\s*\]")
_URL = re.compile(r"(?:https?://|www\.)\S+")
_EMOJI = re.compile("[\u2600-\u27bf\U0001f000-\U0001faff]")
_SOUND = re.compile(r"\([^()]{1,40}\)")
_RESERVED = {0: "padding", 1: "[S1]", 2: "[S2]"}


class TextWarning(UserWarning):
    """A transcript that works but is known to sound bad."""


def encode_text(text: str | bytes, *, max_length: int = MAX_BYTES) -> list[int]:
    """Ids of one transcript, 1 to `max_length` of them, each in 1..255.

    Args:
        text: A `str`, or `bytes` holding UTF-8. A longer one is cut at exactly `max_length` ids, even inside a
            character, as transformers and the original do; `text_warnings` says so beforehand.

    Raises:
        InputError: For what is not text, not UTF-8, a NUL or a raw byte 1 or 2, nothing to say, or longer than
            `ABSURD_BYTES`.
    """
    data = checked_text(text).encode()
    for tag, number in SPEAKER_IDS.items():
        data = data.replace(tag.encode(), bytes([number]))
    return list(data[: whole_number("max_length", max_length, 1)])


def checked_text(text: str | bytes) -> str:
    """The text as `str` if it can be spoken; InputError as in `encode_text` otherwise."""
    if isinstance(text, (bytes, bytearray)):
        _check_size(len(text))
        try:
            text = bytes(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"text is not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} "
                f"({error.reason}); decode it with its own encoding first and pass a str"
            ) from None
    if isinstance(text, str):
        text = text.removeprefix("\ufeff")  # the byte order mark that some editors put in front
    if not isinstance(text, str):
        raise InputError(f"text must be a str (or UTF-8 bytes), not {type(text).__name__}")
    _check_size(len(text))
    try:
        _check_size(len(text.encode("utf-8")))
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds a lone surrogate, U+{ord(text[error.start]):04X} at position {error.start}, which UTF-8 "
            "cannot express; it usually comes from a file read with the wrong encoding"
        ) from None
    for number, meaning in _RESERVED.items():
        place = text.find(chr(number))
        if place >= 0:
            raise InputError(
                f"text holds a raw byte 0x{number:02x} at position {place}, which the model reads as {meaning}; "
                "remove it" + (f", or write {meaning}" if number else "")
            )
    if not text.strip():
        raise InputError("text is empty: there is nothing to say; write for example '[S1] Hello there. [S2] Hi.'")
    if not TAG.sub("", text).strip():
        raise InputError(f"text has only speaker tags ({text.strip()[:40]!r}): put words after them: '[S1] Hello.'")
    return text


def text_warnings(
    text: str | bytes,
    *,
    max_length: int = MAX_BYTES,
    prompt_seconds: float = 0.0,
    least_seconds: float = SHORT_SECONDS,
) -> list[str]:
    """List what is known to sound bad about a text, one sentence each.

    Args:
        prompt_seconds: Length of the audio prompt whose transcript the text begins with; that part is not spoken again.
        least_seconds: Below which speech sounds unnatural.

    Raises:
        InputError: As `encode_text` does.
    """
    text, max_length = checked_text(text), whole_number("max_length", max_length, 1)
    prompt_seconds = real_number("prompt_seconds", prompt_seconds)
    least_seconds = real_number("least_seconds", least_seconds)
    tags = TAG.findall(text)
    found = []
    if not TAG.match(text.lstrip()):
        found.append("the text does not begin with a speaker tag: begin with [S1]")
    elif tags[0] != "[S1]":
        found.append(f"the text begins with {tags[0]}: begin with [S1]")
    for before, after in zip(tags, tags[1:], strict=False):
        if before == after:
            found.append(f"{before} is followed by {after}: speakers should alternate, one tag for each turn")
            break
    unknown = [tag for tag in _LOOKS_LIKE_TAG.findall(text) if tag not in SPEAKER_IDS]
    if unknown:
        found.append(f"{unknown[0]} is not a speaker tag and will be read out as letters: there are only [S1] and [S2]")
    spoken = TAG.sub("", text)
    size = len(spoken.encode()) + len(tags)
    seconds = spoken_seconds(text) - prompt_seconds
    if size > max_length:
        found.append(f"the text takes {size} bytes and the model reads {max_length}: the rest is left out; split it")
    elif seconds > GOOD_SECONDS:
        found.append(
            f"the text is about {seconds:.0f} s of speech, and beyond {GOOD_SECONDS} s it is spoken hastily and "
            "words get lost: split it"
        )
    elif seconds < least_seconds and prompt_seconds < math.inf:
        found.append(
            f"the text is about {max(seconds, 0):.1f} s of speech, and below {least_seconds:g} s it sounds unnatural: "
            "write more"
        )
    return found + _unspeakable(_LOOKS_LIKE_TAG.sub("", spoken))


def _unspeakable(spoken: str) -> list[str]:
    """List what the model was not taught to read, one sentence each."""
    found = []
    if url := _URL.search(spoken):
        found.append(f"{url[0][:40]} is a web address, which is read badly: write it as it is said")
        spoken = _URL.sub("", spoken)
    if digits := re.search(r"\d+", spoken):
        found.append(f"{digits[0][:40]} is written in digits, which are read badly: write numbers as words")
    if emoji := _EMOJI.search(spoken):
        found.append(f"{emoji[0]!r} is a symbol that the model cannot read: leave it out")
    if any(len(_SOUND.findall(sentence)) > MOST_SOUNDS for sentence in re.split(r"[.!?\n]", spoken)):
        found.append(f"a sentence has more than {MOST_SOUNDS} sounds in brackets, which sounds unnatural: use fewer")
    return found


def with_tag(text: str | bytes) -> str | bytes:
    """Put `[S1]` before a text that does not begin with a speaker's tag."""
    if isinstance(text, bytes):
        return text if text.lstrip().startswith(tuple(map(str.encode, SPEAKER_IDS))) else b"[S1] " + text.lstrip()
    if not isinstance(text, str) or text.lstrip().startswith(tuple(SPEAKER_IDS)):
        return text
    return f"[S1] {text.lstrip()}"


def warn_about(
    text: str | bytes,
    *,
    max_length: int = MAX_BYTES,
    prompt_seconds: float = 0.0,
    least_seconds: float = SHORT_SECONDS,
) -> None:
    """Issue each of `text_warnings` as a `TextWarning`."""
    known = {"max_length": max_length, "prompt_seconds": prompt_seconds, "least_seconds": least_seconds}
    for sentence in text_warnings(text, **known):  # type: ignore[arg-type]
        warn(sentence, TextWarning)


def spoken_seconds(text: str) -> float:
    """About how long the text takes to say; its tags take no time."""
    return len(TAG.sub("", text)) / CHARACTERS_PER_SECOND


def join_prompt(prompt_text: str, text: str) -> str:
    """The text to speak in the voice of an audio prompt: the prompt's transcript, a space, the new words."""
    prompt_text, text = checked_text(prompt_text), checked_text(text)
    return f"{prompt_text.rstrip()} {text.lstrip()}"


def _check_size(size: int) -> None:
    if size > ABSURD_BYTES:
        raise InputError(
            f"text is {size} bytes long, and the model reads {MAX_BYTES}: split it into passages of 5 to 20 s of "
            "speech (about 75 to 300 characters)"
        )
