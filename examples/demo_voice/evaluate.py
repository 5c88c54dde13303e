"""Intelligibility of the demo voice: two offline recognisers hear held-out sentences; and the pitch of its voices.

    python -m examples.demo_voice.evaluate RECORDINGS [--model FOLDER] [--count 100]

RECORDINGS: a folder of held-out sentences; made first if it is missing. `pip install "dia-fast[voice]"` brings what
this needs.
"""

import argparse
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
import torch

from dia_fast import Audio, Dia, demo_voice
from dia_fast.checkpoint.demo import TEMPERATURE
from examples.demo_voice.recognisers import RATE, score, sphinx, whisper
from examples.demo_voice.sentences import lines, words
from examples.demo_voice.speech import different, record

SEED = 11
LIMIT = 400  # steps, 8 s
SETTINGS: dict[str, Any] = {"max_new_tokens": LIMIT, "seed": SEED, "temperature": TEMPERATURE}


class Listener:
    """Both recognisers."""

    def __init__(self) -> None:
        self._recognisers = {"pocketsphinx": sphinx(), "whisper tiny.en": whisper()}

    @property
    def names(self) -> list[str]:
        return list(self._recognisers)

    def scores(self, said: Sequence[list[str]], sounds: Sequence[np.ndarray]) -> list[float]:
        """The share of words heard right by each."""
        return [score(said, [hear(sound) for sound in sounds]) for hear in self._recognisers.values()]


def median_pitch(sound: np.ndarray) -> float:
    """In Hz, of what is voiced; NaN if nothing is."""
    import parselmouth

    if len(sound) < RATE // 10:
        return float("nan")
    frequencies = parselmouth.Sound(sound, RATE).to_pitch().selected_array["frequency"]
    voiced = frequencies[frequencies > 0]
    return float(np.median(voiced)) if len(voiced) else float("nan")


def speak(dia: Dia, texts: list[str], **settings: Any) -> list[np.ndarray]:
    """Each text in the same seed and so in the same way as alone."""
    spoken = cast("list[Audio]", dia.generate(texts, **SETTINGS, **settings))
    return [np.asarray(audio.samples, dtype=np.float64) for audio in spoken]


def stream(dia: Dia, texts: list[str]) -> list[np.ndarray]:
    """The same, heard as a stream."""
    streams = [dia.stream(text, **SETTINGS) for text in texts]
    return [np.concatenate([np.asarray(chunk.samples, np.float64) for chunk in chunks]) for chunks in streams]


def table(title: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """In Markdown."""
    top = [f"| {title} | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    return "\n".join(top + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows])


def understood(dia: Dia, narrow: Dia, entries: list[dict[str, Any]], sounds: list[np.ndarray]) -> str:
    """The table of scores, a row for each way to make the sound."""
    listener, codec = Listener(), dia.codec
    texts = [entry["text"] for entry in entries]
    said = [words(text) for text in texts]
    ways: list[tuple[str, Callable[[], list[np.ndarray]]]] = [
        ("original speech", lambda: sounds),
        ("through the codec", lambda: [_through(codec, sound) for sound in sounds]),
        ("generated, guidance 3", lambda: speak(dia, texts)),
        ("generated, no guidance", lambda: speak(dia, texts, guidance_scale=None)),
        ("generated in bf16", lambda: speak(narrow, texts)),
        ("generated as a stream", lambda: stream(dia, texts)),
    ]
    rows = []
    for name, make in ways:
        rows.append((name, [f"{100 * share:.1f} %" for share in listener.scores(said, make())]))
        print(f"  {name}: {', '.join(rows[-1][1])}", flush=True)
    return table("words heard right", listener.names, rows)


def pitches(dia: Dia, entries: list[dict[str, Any]], sounds: list[np.ndarray]) -> str:
    """The table of the voices' pitch, of recordings and of what is generated."""
    texts = [entry["text"] for entry in entries]
    made = speak(dia, texts)
    rows = []
    for speaker in ("[S1]", "[S2]"):
        mine = [index for index, text in enumerate(texts) if text.startswith(speaker)]
        cells = [f"{np.nanmedian([median_pitch(group[index]) for index in mine]):.0f} Hz" for group in (sounds, made)]
        rows.append((speaker, cells))
    return table("median pitch", ["recorded", "generated"], rows)


def cloned(dia: Dia, entries: list[dict[str, Any]], sounds: list[np.ndarray]) -> str:
    """Small and large speakers of each tag lend their voice to a new sentence: does the pitch follow?"""
    rows = []
    for index, speaker in enumerate(("[S1]", "[S2]")):
        mine = sorted(
            (entry["sizes"][index], number) for number, entry in enumerate(entries) if entry["text"].startswith(speaker)
        )
        few = max(1, len(mine) // 4)
        for kind, chosen in (("small", mine[:few]), ("large", mine[-few:])):
            numbers = [number for _, number in chosen]
            others = [entries[number]["text"].split("] ")[1] for number in numbers[1:] + numbers[:1]]
            scripts = [f"{entries[number]['text']} {other}" for number, other in zip(numbers, others, strict=True)]
            prompts = [Audio(_to_the_last_word(sounds[number]).astype(np.float32), RATE) for number in numbers]
            made = speak(dia, scripts, audio_prompt=prompts)
            cells = [
                f"{np.nanmedian([median_pitch(sound) for sound in group]):.0f} Hz"
                for group in ([sounds[number] for number in numbers], made)
            ]
            rows.append((f"{speaker}, {kind} speakers", cells))
    return table("voice cloning: median pitch", ["prompt", "continuation"], rows)


def _to_the_last_word(sound: np.ndarray) -> np.ndarray:
    """Without the silence at the end: after it the voice would take its speech to be over."""
    return sound[: np.flatnonzero(np.abs(sound) > 0.02)[-1] + RATE // 50]


def _through(codec: Any, sound: np.ndarray) -> np.ndarray:
    return codec.decode(codec.encode(torch.from_numpy(sound).float())).double().numpy()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--model", type=Path, help="(default: the voice that comes with the package)")
    parser.add_argument("--codec", default="auto", help="(default: the folder codec in MODEL)")
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    listing = options.recordings / "recordings.jsonl"
    if not listing.is_file():
        record(options.recordings, list(itertools.islice(different(lines(2, held_out=True, turns=1)), 100)), seed=2)
    entries = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()[: options.count]]
    sounds = [soundfile.read(options.recordings / entry["audio"])[0] for entry in entries]
    warnings.simplefilter("ignore")  # of texts that begin with [S2], and of speech that was cut
    model = options.model or demo_voice()
    dia = Dia.from_pretrained(model, codec=options.codec)
    narrow = Dia.from_pretrained(model, codec=options.codec, dtype="bf16")
    print(f"{len(entries)} sentences that training never had, {sum(len(words(e['text'])) for e in entries)} words\n")
    print(f"\n{understood(dia, narrow, entries, sounds)}\n\n{pitches(dia, entries, sounds)}\n")
    print(cloned(dia, entries, sounds))


if __name__ == "__main__":
    main()
