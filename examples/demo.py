"""Speaks a short dialogue in a voice, with everything made on the spot: weights, codec and voice.

    python examples/demo.py [--out FOLDER]

The weights are random, so what comes out is noise. What it shows is that every part of the way runs on this machine:
a checkpoint and a codec are written in the official layouts, loaded again, the voice is encoded, the transcript is
spoken after it, and the sound is written to a file. Nothing is downloaded.
"""

import argparse
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import soundfile
import torch

from dia_fast import Audio, Dia, DiaConfig
from dia_fast.codec import CodecConfig, random_codec
from dia_fast.config import DecoderConfig, EncoderConfig
from dia_fast.convert import save_pretrained
from dia_fast.packing import packed_shapes

SEED = 7
VOICE_SAYS = "[S1] This is how I sound. [S2] And this is me."
DIALOGUE = "[S1] Did you hear that? [S2] Hear what? [S1] Exactly."
NEW_TOKENS = 260  # three seconds of sound

# Dia's own vocabularies, channels and delays, in a model of some three million weights.
MODEL = DiaConfig(
    EncoderConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    ),
    DecoderConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        cross_num_attention_heads=4,
        cross_num_key_value_heads=4,
        cross_head_dim=32,
        cross_hidden_size=64,
    ),
)
# The frame rate and the codebooks of the codec that Dia speaks through, at an eighth of its width.
CODEC = CodecConfig(encoder_hidden_size=8, decoder_hidden_size=192)


def make_model(folder: Path) -> None:
    """Writes random weights as a checkpoint that transformers would load too."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in packed_shapes(MODEL).items():
        weight = torch.randn(shape, generator=generator)
        is_norm, is_table = len(shape) == 1, name.endswith("embedding")
        # Outputs of unit variance, so that logits differ by a few units.
        weights[name] = 1 + 0.1 * weight if is_norm else weight if is_table else weight * shape[1] ** -0.5
    save_pretrained(folder, MODEL, weights)


def make_voice(path: Path) -> None:
    """Writes 1.2 seconds of a buzz with a moving pitch: stereo at 22.05 kHz, neither of which the codec takes."""
    rate = 22_050
    seconds = np.arange(int(1.2 * rate)) / rate
    phase = 2 * np.pi * (120 * seconds + 8 * np.sin(2 * np.pi * seconds))
    buzz = sum(np.sin(k * phase) / k for k in range(1, 12)) * 0.2 * np.sin(np.pi * seconds / 1.2)
    soundfile.write(path, np.stack([buzz, 0.8 * buzz], axis=1), rate)


def main() -> None:
    """Makes what is needed, speaks, and says where the sound is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for everything (%(default)s)")
    out = parser.parse_args().out
    for part in ("model", "codec"):
        shutil.rmtree(out / part, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)

    print(f"Writing a random model, a random codec and a voice to {out}")
    make_model(out / "model")
    random_codec(CODEC, seed=SEED).save_pretrained(out / "codec")
    make_voice(out / "voice.wav")

    # Tensors this small gain nothing from threads, and lose much where other programs are at work.
    torch.set_num_threads(1)
    dia = Dia.from_pretrained(out / "model", codec=out / "codec")
    print(f"Loaded {dia}\nSpeaking after the voice: {DIALOGUE}")
    # Random weights do not know when a dialogue ends; real ones do.
    warnings.filterwarnings("ignore", "speech was cut")
    start = time.perf_counter()
    audio = dia.generate(
        f"{VOICE_SAYS} {DIALOGUE}",
        audio_prompt=out / "voice.wav",
        max_new_tokens=NEW_TOKENS,
        seed=SEED,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    assert isinstance(audio, Audio)
    path = audio.save(out / "dialogue.wav")

    print(f"Spoke {audio.duration:.2f} s of sound in {seconds:.1f} s (voice encoded, codes generated, sound decoded)")
    print(f"\nThe sound is in {path.resolve()}")
    print("It is noise, because the weights are random; every part ran, and nothing was downloaded.")
    print("For speech, let the official weights be downloaded (3.2 GB):")
    print('    dia-fast speak "[S1] Did you hear that? [S2] Hear what?" --model nari-labs/Dia-1.6B-0626 -o out.wav')


if __name__ == "__main__":
    main()
