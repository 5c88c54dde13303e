"""Training speech: turns of many voices, as shards of sound that are made once.

    python -m examples.demo_voice.speech KOKORO SPEECH --turns 4000

A third of the turns are of the two default voices. Shards are independent: a run that was stopped goes on with the
first that is missing, and more turns add shards without changing those that are there.
"""

import argparse
import json
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from examples.demo_voice.kokoro import RATE, VOICES, Kokoro
from examples.demo_voice.texts import turn
from examples.demo_voice.turns import DEFAULT_PAIR

SHARD = 50  # turns
GAP = RATE // 5
DEFAULT_SHARE = 1 / 3
SPEEDS = (0.9, 1.0, 1.0, 1.1)
BLOCK = RATE  # samples that are written at a time: libsndfile's Vorbis crashes on minutes at once

Say = Callable[[str, str, float], np.ndarray]


def plan(shard: int, seed: int) -> list[dict[str, Any]]:
    """The turns of a shard: voice, text and speed of each."""
    draw = random.Random(zlib.crc32(f"{seed} {shard}".encode()))
    turns = []
    for _ in range(SHARD):
        voice = draw.choice(DEFAULT_PAIR if draw.random() < DEFAULT_SHARE else VOICES)
        turns.append({"voice": voice, "text": turn(draw), "speed": draw.choice(SPEEDS)})
    return turns


def make_shard(shard: int, folder: Path, say: Say, seed: int) -> None:
    """Write the sound of a shard and then, when it is whole, its lines."""
    sounds, lines, at = list[np.ndarray](), [], 0
    for wanted in plan(shard, seed):
        sound = say(wanted["text"], wanted["voice"], wanted["speed"])
        lines.append({"shard": shard, "start": at, "end": at + len(sound), **wanted})
        sounds += [sound, np.zeros(GAP, np.float32)]
        at += len(sound) + GAP
    row = np.concatenate(sounds)
    with soundfile.SoundFile(folder / f"{shard:04}.ogg", "w", RATE, 1, format="OGG", subtype="VORBIS") as file:
        for first in range(0, len(row), BLOCK):
            file.write(row[first : first + BLOCK])
    part = folder / f"{shard:04}.tmp"
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(part, part.with_suffix(".jsonl"))


def make(folder: Path, say: Say, turns: int, seed: int) -> None:
    """Make the shards that are missing, then the list of all turns."""
    folder.mkdir(parents=True, exist_ok=True)
    listings = [folder / f"{shard:04}.jsonl" for shard in range(-(-turns // SHARD))]
    for shard, listing in enumerate(tqdm(listings, unit="shard", dynamic_ncols=True)):
        if not listing.is_file():
            make_shard(shard, folder, say, seed)
    whole = folder / "turns.tmp"
    whole.write_text("".join(listing.read_text(encoding="utf-8") for listing in listings), encoding="utf-8")
    os.replace(whole, folder / "turns.jsonl")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kokoro", type=Path)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--turns", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    make(options.speech, Kokoro(options.kokoro, options.threads).say, options.turns, options.seed)


if __name__ == "__main__":
    main()
