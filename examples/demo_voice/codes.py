"""Turns of speech become codes, each turn once: dialogues are joined of codes, for silence has codes of its own.

    python -m examples.demo_voice.codes SPEECH CODEC CODES

A turn is cut where its speech begins and ends and coded amid silence, so that what stands before and after it in a
dialogue, silence as well, changes nothing in its codes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from dia_fast.audio.codec import Codec, load_codec
from examples.demo_voice.stages import save
from examples.demo_voice.turns import RATE, SOFT, Turn, load_turns, of_training, sentences, text_is_held_out

AROUND = 16  # frames of silence that a turn is coded amid
KEPT = 3  # of these, on both sides, that belong to it
SAVE = 200  # turns between states that a stopped run goes on from
# Of speech to learn from: a factor of time and pitch, and parts of a frame by which it begins later.
VARIANTS = ((1.0, 0.0), (1.0, 0.5), (1.07, 0.25), (0.94, 0.75))


@dataclass(frozen=True)
class TurnCodes:
    """A turn as codes: `[frames, codebooks]` int16, with `KEPT` frames of silence at both ends."""

    voice: str
    text: str
    codes: Tensor


def trimmed(samples: np.ndarray, hop: int) -> np.ndarray:
    """The speech without the silence around it, padded to whole frames."""
    loud = np.flatnonzero(np.abs(samples) > SOFT)
    speech = samples[loud[0] : loud[-1] + 1] if len(loud) else samples
    return np.pad(speech, (0, -len(speech) % hop))


def varied(turn: Turn) -> list[tuple[Turn, float]]:
    """Sentences of a turn in all variants, each with how late in a frame it begins; of a held-out turn only itself.

    There is too little speech to be heard once: what a model may learn by heart should be little. The same speaker
    faster and higher, or slower and lower, counts as another one.
    """
    if not of_training(turn):
        return [(turn, 0.0)]
    found = list[tuple[Turn, float]]()
    for part in sentences(turn):
        for factor, late in VARIANTS[:1] if text_is_held_out(part.text) else VARIANTS:
            voice = part.voice if factor == 1 else f"{part.voice}@{factor:g}"
            samples = part.samples if factor == 1 else soxr.resample(part.samples, RATE * factor, RATE)
            found.append((Turn(voice, part.text, samples), late))
    return found


def silence_of(codec: Codec) -> Tensor:
    """The codes of a frame amid silence, `[codebooks]`."""
    return codec.encode(torch.zeros(3 * AROUND * codec.hop_length, device=codec.device))[AROUND * 3 // 2].cpu().short()


def encoded(turn: Turn, codec: Codec, late: float = 0.0) -> TurnCodes:
    """The codes of one turn. late: parts of a frame that pass before it begins."""
    hop = codec.hop_length
    speech = trimmed(turn.samples, 1)
    before = int(late * hop)
    speech = np.pad(np.pad(speech, (before, -(len(speech) + before) % hop)), AROUND * hop)
    codes = codec.encode(torch.from_numpy(speech).to(codec.device))
    return TurnCodes(turn.voice, turn.text, codes[AROUND - KEPT : KEPT - AROUND].cpu().short())


def write(turns: list[tuple[Turn, float]], codec: Codec, output: Path) -> None:
    """Code all turns, which begin so late in a frame, and write them, and the codes of silence, as one file.

    What a run that was stopped had coded lies beside it, in `OUTPUT.part`; it goes on from there.
    """
    part = output.with_suffix(".part")
    made: list[Tensor] = torch.load(part, weights_only=True) if part.is_file() else []
    left = turns[len(made) :]
    for turn, late in tqdm(left, unit="turn", dynamic_ncols=True, mininterval=30):
        made.append(encoded(turn, codec, late).codes)
        if len(made) % SAVE == 0:
            save(made, part)
    held = {
        "codes": torch.cat(made),
        "frames": torch.tensor(list(map(len, made))),
        "silence": silence_of(codec),
        "voices": [turn.voice for turn, _ in turns],
        "texts": [turn.text for turn, _ in turns],
    }
    save(held, output)
    part.unlink(missing_ok=True)


def read(path: Path) -> tuple[list[TurnCodes], Tensor]:
    """All turns, and the codes of silence."""
    held = torch.load(path, weights_only=True)
    parts = held["codes"].split(held["frames"].tolist())
    turns = [TurnCodes(*turn) for turn in zip(held["voices"], held["texts"], parts, strict=True)]
    return turns, held["silence"]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("speech", "codec", "codes"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    turns = [each for turn in load_turns(options.speech) for each in varied(turn)]
    write(turns, load_codec(options.codec, device), options.codes)


if __name__ == "__main__":
    main()
