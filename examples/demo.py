"""Speaks a short dialogue with the demo voice that comes with the package. Nothing is downloaded.

    python examples/demo.py [--out FOLDER]

The voice is a whole Dia of six million weights with a codec of its own, in the official layout: two synthetic speakers
who know some four dozen words.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from dia_fast import Audio, Dia, demo_voice

SEED = 7
DIALOGUE = "[S1] Good morning, the red book is in the kitchen. [S2] Thank you, please close the green window."


def main() -> None:
    """Load the voice, speak, and say where the sound is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the sounds (%(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    # Tensors this small gain nothing from threads, and lose much where other programs are at work.
    torch.set_num_threads(1)
    dia = Dia.from_pretrained(demo_voice())
    print(f"Loaded the demo voice, {dia}")

    start = time.perf_counter()
    audio = dia.generate(DIALOGUE, temperature=0.5, seed=SEED, progress=sys.stderr.isatty())
    assert isinstance(audio, Audio)
    path = audio.save(out / "dialogue.wav")
    print(f"{audio.duration:.2f} s of sound in {time.perf_counter() - start:.1f} s: {DIALOGUE}")
    print(f"\nThe sound is in {path.resolve()}")
    print("It knows some four dozen words. For any text, let the official weights be downloaded (3.2 GB):")
    print('    dia-fast speak "[S1] Did you hear that? [S2] Hear what?" --model nari-labs/Dia-1.6B-0626 -o out.wav')


if __name__ == "__main__":
    main()
