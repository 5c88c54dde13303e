"""Turns of speech become codes, each turn once: dialogues are joined of codes, for silence has codes of its own.

    python -m examples.demo_voice.codes SPEECH CODEC CODES

A turn is cut where its speech begins and ends and coded amid silence, so that what stands before and after it in a
dialogue, silence as well, changes nothing in its codes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dia_fast.audio.codec import Codec, load_codec
from examples.demo_voice.stages import save
from examples.demo_voice.turns import Turn, load_turns

AROUND = 16  # frames of silence that a turn is coded amid
KEPT = 3  # of these, on both sides, that belong to it
SOFT = 0.01  # what is softer at its ends is no speech


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


def silence_of(codec: Codec) -> Tensor:
    """The codes of a frame amid silence, `[codebooks]`."""
    return codec.encode(torch.zeros(3 * AROUND * codec.hop_length, device=codec.device))[AROUND * 3 // 2].cpu().short()


def encoded(turn: Turn, codec: Codec) -> TurnCodes:
    """The codes of one turn."""
    hop = codec.hop_length
    speech = np.pad(trimmed(turn.samples, hop), AROUND * hop)
    codes = codec.encode(torch.from_numpy(speech).to(codec.device))
    return TurnCodes(turn.voice, turn.text, codes[AROUND - KEPT : KEPT - AROUND].cpu().short())


def write(turns: list[Turn], codec: Codec, output: Path) -> None:
    """Code all turns and write them, and the codes of silence, as one file."""
    coded = [encoded(turn, codec) for turn in tqdm(turns, unit="turn", dynamic_ncols=True, mininterval=30)]
    held = {
        "codes": torch.cat([turn.codes for turn in coded]),
        "frames": torch.tensor([len(turn.codes) for turn in coded]),
        "silence": silence_of(codec),
        "voices": [turn.voice for turn in coded],
        "texts": [turn.text for turn in coded],
    }
    save(held, output)


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
    write(load_turns(options.speech), load_codec(options.codec, device), options.codes)


if __name__ == "__main__":
    main()
