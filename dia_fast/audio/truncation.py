"""Recordings that end too early: decoders play what is there of them and say nothing.

Compares what a file declares with what it holds, without decoding: the sizes of WAV and AIFF chunks, the last page of
an Ogg stream, the Xing header or the last frame of an MP3. Of FLAC the decoder itself refuses such files.
"""

import os
import struct
from typing import BinaryIO

_ENDLESS = 0x7FFF0000  # sizes from here on are what programs write that do not know the length
_MOST_FRAMES = 50_000  # of an MP3 without a Xing header that are looked at: 20 minutes


def cut_off(file: BinaryIO) -> str | None:
    """Say in what way an audio file ends too early, or None. Moves the file's position."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        return _chunks(file, size, "<", b"data")
    if head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        return _chunks(file, size, ">", b"SSND")
    if head[:4] == b"OggS":
        return _ogg(file, size)
    if head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        return _mp3(file, size)
    return None


def _chunks(file: BinaryIO, size: int, order: str, wanted: bytes) -> str | None:
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        left = size - position - 8
        if name == wanted:
            if left < length < _ENDLESS:
                return f"its header tells of {length} bytes of sound, and {left} are there"
            return None
        position += 8 + length + length % 2
    return None


def _ogg(file: BinaryIO, size: int) -> str | None:
    file.seek(max(0, size - (1 << 17)))  # a page has at most 65,307 bytes
    tail = file.read(1 << 17)
    at = tail.rfind(b"OggS")
    page = tail[at:]
    sizes = page[27 : 27 + page[26]] if len(page) >= 27 else b""
    if at < 0 or len(page) < 27 + page[26:27].ljust(1)[0] or len(page) < 27 + len(sizes) + sum(sizes):
        return "its last page is not complete"
    return None if page[5] & 4 else "the page that ends an Ogg stream is missing"


def _mp3(file: BinaryIO, size: int) -> str | None:
    start = 0
    file.seek(0)
    head = file.read(10)
    if head[:3] == b"ID3":
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    file.seek(start)
    first = file.read(256)
    for name in (b"Xing", b"Info"):
        at = first.find(name, 4, 44)
        if at >= 0 and len(first) >= at + 16 and first[at + 7] & 2:
            declared = struct.unpack_from(">I", first, at + (12 if first[at + 7] & 1 else 8))[0]
            left = size - start
            # Some writers leave the header's own frame out.
            return f"its header tells of {declared} bytes, and {left} are there" if left + 2 < declared else None
    for _ in range(_MOST_FRAMES):
        file.seek(start)
        head = file.read(4)
        if len(head) < 4:
            return "it ends within a frame" if head[:1] == b"\xff" else None
        length = _frame_bytes(head)
        if length is None:
            return None  # a tag, or no MP3
        if start + length > size:
            return "it ends within a frame"
        start += length
    return None


_RATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_RATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def _frame_bytes(head: bytes) -> int | None:
    """The length of a frame of MPEG audio, layer III, by its header; None if it is none."""
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    rate, sampling, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if head[0] != 0xFF or head[1] < 0xE0 or layer != 1 or version == 1 or rate in (0, 15) or sampling == 3:
        return None
    per_second = (44_100, 48_000, 32_000)[sampling] >> {3: 0, 2: 1, 0: 2}[version]
    bits = (_RATES_1 if version == 3 else _RATES_2)[rate] * 1000
    return (144 if version == 3 else 72) * bits // per_second + padding
