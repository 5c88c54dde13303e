"""Turns of speech as the recipe keeps them: shards of sound, and a line of JSON for each turn.

A folder of speech has `turns.jsonl`, each line with `shard` (its sound is `NNNN.ogg` or `.flac`), `start` and `end` in
samples of the shard, `voice`, and `text`. Two speakers, and all turns whose text a hash picks, are kept for testing.
"""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

RATE = 16_000  # samples per second, of everything after the speech itself
GAP = RATE // 5  # samples of silence between turns in a row
SOFT = 0.01  # what is softer at the ends of speech, or between its sentences, is no speech
NEAR = 0.12  # of the turn, that a pause may be away from where its sentence should end
DEFAULT_PAIR = ("am_michael", "af_heart")  # of [S1] and [S2] where no prompt says who speaks
HELD_OUT_VOICES = ("bf_isabella", "am_liam")
HELD_OUT = 4  # per cent of all texts


@dataclass(frozen=True)
class Turn:
    """A speaker's turn of one to three sentences: `samples` float32 at `RATE`."""

    voice: str
    text: str
    samples: np.ndarray


def words(text: str) -> list[str]:
    """The words of a sentence or transcript, without tags and punctuation, in lower case."""
    bare = text.lower().replace("[s1]", " ").replace("[s2]", " ")
    return "".join(letter if letter.isalpha() or letter == "'" else " " for letter in bare).split()


def text_is_held_out(text: str) -> bool:
    """Tell whether a turn with this text is kept for testing."""
    return zlib.crc32(" ".join(words(text)).encode()) % 100 < HELD_OUT


def of_training(turn: Turn) -> bool:
    """Tell whether training may hear this turn."""
    return turn.voice not in HELD_OUT_VOICES and not text_is_held_out(turn.text)


def load_turns(folder: Path) -> list[Turn]:
    """All turns of a folder, in order, at `RATE`."""
    turns, sounds = [], dict[int, tuple[np.ndarray, int]]()
    for line in (folder / "turns.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        shard = entry["shard"]
        if shard not in sounds:
            [path] = (path for end in ("ogg", "flac") if (path := folder / f"{shard:04}.{end}").is_file())
            sounds = {shard: soundfile.read(path, dtype="float32")}
        sound, rate = sounds[shard]
        samples = soxr.resample(sound[entry["start"] : entry["end"]], rate, RATE)
        turns.append(Turn(entry["voice"], entry["text"], samples))
    return turns


def sentences(turn: Turn) -> list[Turn]:
    """Cut a turn into its sentences where it pauses; where a pause is missing or not clear it stays whole."""
    texts = [found.strip() for found in re.findall(r"[^.?!]+[.?!]+", turn.text)]
    loud = np.flatnonzero(np.abs(turn.samples) > SOFT)
    if len(texts) < 2 or not len(loud):
        return [turn]
    gaps = np.flatnonzero(np.diff(loud) >= GAP // 2)
    middles = (loud[gaps] + loud[gaps + 1]) // 2
    where = (middles - loud[0]) / (loud[-1] - loud[0])
    letters = np.cumsum([len(text) for text in texts])
    cuts = [0]
    for expected in letters[:-1] / letters[-1]:
        near = np.flatnonzero(np.abs(where - expected) < NEAR)
        if not len(near):
            return [turn]
        cuts.append(int(middles[near[np.argmax(loud[gaps + 1][near] - loud[gaps][near])]]))
    if len(set(cuts)) <= len(texts) - 1 or cuts != sorted(cuts):
        return [turn]
    ends = [*cuts[1:], len(turn.samples)]
    return [
        Turn(turn.voice, *of) for of in zip(texts, map(turn.samples.__getitem__, map(slice, cuts, ends)), strict=True)
    ]


def pcm(turns: list[Turn]) -> Tensor:
    """All samples in a row, int16, with a little silence between turns."""
    silence = np.zeros(GAP, np.float32)
    row = np.concatenate([part for turn in turns for part in (turn.samples, silence)])
    return torch.from_numpy((row.clip(-1, 1) * 32767).round().astype(np.int16))
