"""Measures the demo voice: words understood in sentences, dialogues and long scripts, joints, drift, cloning.

    python -m examples.demo_voice.evaluate KOKORO [--model FOLDER] [--count 60] [--only dialogues,scripts]

Two offline recognisers hear sentences that were written by hand, `held_out.txt`, those of them whose words the voice
knows. Beside each score is that of the same text as Kokoro speaks it, and of that through the codec. KOKORO: the
folder of Kokoro's model; fetched first if it is missing. `pip install "dia-fast[voice]"` brings what this needs.
"""

import argparse
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import soxr
import torch

from dia_fast import Audio, Dia, demo_voice
from dia_fast.checkpoint.demo import TEMPERATURE
from dia_fast.text.tokenizer import spoken_seconds
from examples.demo_voice import kokoro
from examples.demo_voice.codes import trimmed
from examples.demo_voice.recognisers import RATE, score, sphinx, whisper
from examples.demo_voice.texts import held_out_sentences
from examples.demo_voice.turns import DEFAULT_PAIR, HELD_OUT_VOICES, words

SEED = 11
PAUSE = RATE * 3 // 10  # samples between the turns of a recording
SOFT = 0.01  # what is softer is no speech
WINDOW = RATE // 100  # samples in which the level is measured
SETTINGS: dict[str, Any] = {"seed": SEED, "temperature": TEMPERATURE}


@dataclass(frozen=True)
class Script:
    """A transcript and its turns, `(0 for [S1] or 1 for [S2], sentence)`."""

    turns: tuple[tuple[int, str], ...]

    @property
    def text(self) -> str:
        return " ".join(f"[S{tag + 1}] {sentence}" for tag, sentence in self.turns)

    @property
    def words(self) -> list[str]:
        return words(self.text)


def dialogues(sentences: Sequence[str], turns: int, count: int, seed: int = SEED) -> list[Script]:
    """Dialogues of so many turns, a sentence each; in every dialogue all are different if there are enough."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        chosen = draw.sample(list(sentences), turns) if turns <= len(sentences) else draw.choices(sentences, k=turns)
        made.append(Script(tuple((number % 2, sentence) for number, sentence in enumerate(chosen))))
    return made


def long_script(sentences: Sequence[str], seconds: float, tags: Sequence[int] = (0, 1), seed: int = SEED) -> Script:
    """Turns in the order of tags until they take so long to say."""
    draw, said = random.Random(seed), list[tuple[int, str]]()
    while sum(spoken_seconds(sentence) for _, sentence in said) < seconds:
        said.append((tags[len(said) % len(tags)], draw.choice(sentences)))
    return Script(tuple(said))


def at_rate(sound: np.ndarray, rate: float) -> np.ndarray:
    """Samples at `RATE`, float64."""
    return np.asarray(sound if rate == RATE else soxr.resample(sound, rate, RATE), np.float64)


def levels(sound: np.ndarray) -> np.ndarray:
    """Root mean square of each window of 10 ms."""
    whole = sound[: len(sound) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return np.sqrt(np.square(whole).mean(1))


def joint_levels(sound: np.ndarray, joints: Iterable[int]) -> tuple[float, float]:
    """Measure joints: the loudest 10 ms within 50 ms of one, and the largest step between two samples there.

    Both in dB relative to the loud parts (99th percentile) of the rest; NaN if there is no joint.
    """
    steps, level, joints = np.abs(np.diff(sound)), levels(sound), list(joints)
    near, near_steps = np.zeros(len(level), bool), np.zeros(len(steps), bool)
    for joint in joints:
        near[max(0, joint // WINDOW - 5) : joint // WINDOW + 5] = True
        near_steps[max(0, joint - WINDOW) : joint + WINDOW] = True
    if not near.any() or near.all():
        return float("nan"), float("nan")

    def decibels(found: np.ndarray, rest: np.ndarray) -> float:
        return float(20 * np.log10(max(found.max(), 1e-9) / max(np.percentile(rest, 99), 1e-9)))

    return decibels(level[near], level[~near]), decibels(steps[near_steps], steps[~near_steps])


def median_pitch(sound: np.ndarray) -> float:
    """In Hz, of what is voiced; NaN if nothing is."""
    import parselmouth

    if len(sound) < RATE // 10:
        return float("nan")
    frequencies = parselmouth.Sound(sound, RATE).to_pitch().selected_array["frequency"]
    voiced = frequencies[frequencies > 0]
    return float(np.median(voiced)) if len(voiced) else float("nan")


def semitones(first: float, last: float) -> float:
    """From one pitch to another."""
    return 12 * float(np.log2(last / first))


def timbre(sound: np.ndarray) -> np.ndarray:
    """A speaker by two facts: the pitch in semitones, and the mean shape of the spectrum of voiced sound in dB.

    `[1 + bands]` float64, so scaled that a distance of 1 is one that a listener would begin to hear.
    """
    level = levels(sound)
    loud = np.repeat(level > 0.3 * np.percentile(level, 90), WINDOW)
    speech = torch.from_numpy(sound[: len(loud)][loud])
    window = torch.hann_window(512, dtype=torch.float64)
    power = torch.stft(speech, 512, 256, window=window, return_complex=True).abs().square().mean(1)
    edges = np.unique(np.geomspace(3, 256, 17).astype(int))
    bands = [power[first:last].mean().item() for first, last in zip(edges, edges[1:], strict=False)]
    shape = 10 * np.log10(np.maximum(bands, 1e-12))
    pitch = median_pitch(sound)
    return np.concatenate([[12 * np.log2(pitch if pitch > 0 else 1.0)], (shape - shape.mean()) / 3])


class Evaluation:
    """The voice, the recognisers, and Kokoro for originals."""

    def __init__(self, model: Path, codec: str, source: Path, count: int) -> None:
        self.model, self.codec_name, self.count = model, codec, count
        self.dia = Dia.from_pretrained(model, codec=codec)
        self.rate = self.dia.codec.sample_rate
        self.recognisers = {"pocketsphinx": sphinx(grammar=False), "whisper tiny.en": whisper()}
        self.kokoro = kokoro.Kokoro(source)
        listed = model / "vocabulary.txt"
        known = listed.read_text(encoding="utf-8").split() if listed.is_file() else None
        self.sentences = held_out_sentences(known)
        if len(self.sentences) < 8:
            sys.exit(f"{model} knows the words of {len(self.sentences)} held-out sentences; 8 are needed")

    @cached_property
    def int8(self) -> Dia:
        return Dia.from_pretrained(self.model, codec=self.codec_name, weights="int8")

    def original(self, script: Script, pair: Sequence[str] = DEFAULT_PAIR) -> np.ndarray:
        """The script as Kokoro's voices speak it."""
        parts = list[np.ndarray]()
        for tag, sentence in script.turns:
            sound = at_rate(self.kokoro.say(sentence, pair[tag]), kokoro.RATE)
            parts += [trimmed(sound, 1), np.zeros(PAUSE)]
        return np.concatenate(parts[:-1])

    def through(self, sound: np.ndarray) -> np.ndarray:
        """The same through the voice's codec."""
        given = torch.from_numpy(soxr.resample(sound, RATE, self.rate).astype(np.float32))
        return at_rate(self.dia.codec.decode(self.dia.codec.encode(given)).numpy(), self.rate)

    def spoken(self, scripts: Sequence[Script], dia: Dia | None = None, **settings: Any) -> list[np.ndarray]:
        """Each as the voice speaks it, in the same seed and so in the same way as alone."""
        texts = [script.text for script in scripts]
        made = cast("list[Audio]", (dia or self.dia).generate(texts, **SETTINGS, **settings))
        return [at_rate(audio.samples, self.rate) for audio in made]

    def heard(self, said: Sequence[list[str]], sounds: Sequence[np.ndarray]) -> list[str]:
        """The share of words that each recogniser hears right."""
        found = (score(said, [hear(sound) for sound in sounds]) for hear in self.recognisers.values())
        return [f"{100 * share:.1f} %" for share in found]

    def row(self, name: str, scripts: Sequence[Script], sounds: Sequence[np.ndarray], *more: str) -> list[str]:
        """A line of a table, printed as soon as it is known."""
        cells = [name, *self.heard([script.words for script in scripts], sounds), *more]
        print(f"| {' | '.join(cells)} |", flush=True)
        return cells

    def head(self, title: str, *more: str) -> None:
        """The head of a table."""
        names = [title, *self.recognisers, *more]
        print(f"\n| {' | '.join(names)} |\n|---|{'---:|' * (len(names) - 1)}", flush=True)


def sentences(run: Evaluation) -> None:
    """Single sentences: guidance, 8 bits, a stream."""
    chosen = run.sentences[: run.count]
    scripts = [Script(((number % 2, sentence),)) for number, sentence in enumerate(chosen)]
    originals = [run.original(script) for script in scripts]
    run.head(f"{len(scripts)} sentences, {sum(len(script.words) for script in scripts)} words")
    run.row("original", scripts, originals)
    run.row("through the codec", scripts, [run.through(sound) for sound in originals])
    run.row("generated, guidance 3", scripts, run.spoken(scripts, guidance_scale=3.0))
    run.row("generated, no guidance", scripts, run.spoken(scripts, guidance_scale=None))
    run.row("generated, int8", scripts, run.spoken(scripts, run.int8))
    streams = [run.dia.stream(script.text, **SETTINGS) for script in scripts]
    sounds = [np.concatenate([np.asarray(chunk.samples) for chunk in chunks]) for chunks in streams]
    run.row("generated, as a stream", scripts, [at_rate(sound, run.rate) for sound in sounds])


def conversations(run: Evaluation) -> None:
    """Dialogues of 2, 4 and 8 turns, and how long they last against the original."""
    for turns in (2, 4, 8):
        scripts = dialogues(run.sentences, turns, max(2, run.count // turns))
        originals = [run.original(script) for script in scripts]
        made = run.spoken(scripts)
        length = sum(map(len, made)) / sum(map(len, originals))
        run.head(f"{len(scripts)} dialogues of {turns} turns", "length")
        run.row("original", scripts, originals, "100 %")
        run.row("through the codec", scripts, [run.through(sound) for sound in originals], "100 %")
        run.row("generated", scripts, made, f"{100 * length:.0f} %")
        run.row("generated, int8", scripts, run.spoken(scripts, run.int8), "")


def segments_of(audio: Audio, hop: int) -> list[tuple[int, int]]:
    """The samples at which each segment begins and ends."""
    assert audio.outcome is not None
    ends = np.cumsum([segment.frames * hop for segment in audio.outcome.segments]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def scripts(run: Evaluation, seconds: float = 60.0, seeds: int = 3) -> None:
    """Long scripts through split="auto": words, silent segments, length, joints, and the drift of pitch."""
    hop = run.dia.codec.hop_length
    prompt = dialogues(run.sentences, 2, 1, seed=1)[0]
    [voice] = run.spoken([prompt])
    given = {"audio_prompt": Audio(voice[: _end(voice)].astype(np.float32), RATE), "prompt_text": prompt.text}
    kinds: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        ("dialogue", (0, 1), {}), ("dialogue, in a given voice", (0, 1), given), ("only [S1]", (0,), {}),
        ("only [S2]", (1,), {}),
    ]  # fmt: skip
    run.head(f"scripts of {seconds:g} s, {seeds} seeds", "length", "silent", "joints", "steps at joints", "drift")
    for name, tags, settings in kinds:
        script = long_script(run.sentences, seconds, tags)
        original = run.original(script)
        if not settings:
            run.row(f"{name}, original", [script], [original], *5 * [""])
        made, drifts, joints, silent, count = [], [], [], 0, 0
        for seed in range(SEED, SEED + seeds):
            audio = run.dia.generate(script.text, **(SETTINGS | {"seed": seed}), **settings, split="auto")
            assert isinstance(audio, Audio)
            spans, samples = segments_of(audio, hop), np.asarray(audio.samples, np.float64)
            parts = [at_rate(samples[first:last], run.rate) for first, last in spans]
            silent += sum(1 for part in parts if not len(part) or np.abs(part).max() < SOFT)
            count += len(parts)
            joints.append(joint_levels(at_rate(samples, run.rate), (last * RATE // run.rate for _, last in spans[:-1])))
            if len(tags) == 1:
                drifts.append(semitones(median_pitch(parts[0]), median_pitch(parts[-1])))
            made.append(at_rate(samples, run.rate))
        loud, steps = np.nanmax(np.array(joints), 0) if np.isfinite(joints).any() else (np.nan, np.nan)
        drift = f"{np.nanmax(np.abs(drifts)):.1f} semitones" if np.isfinite(drifts).any() else ""
        length = np.mean([len(sound) for sound in made]) / len(original)
        more = (f"{100 * length:.0f} %", f"{silent} of {count}", f"{loud:.1f} dB", f"{steps:.1f} dB", drift)
        run.row(name, [script] * seeds, made, *more)


def _end(sound: np.ndarray) -> int:
    """The sample after the last word."""
    return int(np.flatnonzero(np.abs(sound) > SOFT)[-1]) + RATE // 50 if np.abs(sound).max() > SOFT else len(sound)


def cloning(run: Evaluation) -> None:
    """Prompts of 1, 2 and 4 turns in known and in held-out voices: words, and whose voice goes on."""
    references = {name: timbre(run.through(run.original(*_reference(run, name)))) for name in kokoro.VOICES}

    def nearest(sound: np.ndarray) -> str:
        mine = timbre(sound)
        return min(references, key=lambda name: float(np.abs(references[name] - mine).mean()))

    known = [name for name in kokoro.VOICES if name not in HELD_OUT_VOICES]
    each = max(2, run.count // 12)
    run.head(f"{each} prompts each", "own voice is nearest")
    for kind, voices in (("known", known), ("held-out", HELD_OUT_VOICES)):
        for turns in (1, 2, 4):
            said, sounds, own = [], [], 0
            for number in range(each):
                draw = random.Random(f"{SEED} {kind} {turns} {number}")
                pair = draw.sample(list(voices), 2)
                whole = dialogues(run.sentences, turns + 1, 1, seed=draw.randrange(2**30))[0]
                before = Script(whole.turns[:turns])
                # The speaker of the last turn of the prompt goes on, so that it is known whose voice it has to be.
                after = Script(((before.turns[-1][0], whole.turns[-1][1]),))
                recording = run.original(before, pair)
                prompt = Audio(recording.astype(np.float32), RATE)
                [sound] = run.spoken([after], audio_prompt=prompt, prompt_text=before.text)
                said.append(after)
                sounds.append(sound)
                own += len(sound) > RATE // 2 and nearest(sound) == pair[after.turns[0][0]]
            run.row(f"{kind} voices, {turns} turns", said, sounds, f"{own} of {each}")


def _reference(run: Evaluation, name: str) -> tuple[Script, tuple[str, str]]:
    return Script(tuple((0, sentence) for sentence in run.sentences[:3])), (name, name)


PARTS: dict[str, Callable[[Evaluation], None]] = {
    "sentences": sentences, "dialogues": conversations, "scripts": scripts, "cloning": cloning,
}  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kokoro", type=Path)
    parser.add_argument("--model", type=Path, help="(default: the voice that comes with the package)")
    parser.add_argument("--codec", default="auto", help="(default: the folder codec in MODEL)")
    parser.add_argument("--count", type=int, default=60, help="of sentences; of other things fewer")
    parser.add_argument("--only", help=f"parts, of {','.join(PARTS)}")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        sys.exit(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    if not (options.kokoro / "model.onnx").is_file():
        kokoro.fetch(options.kokoro)
    warnings.simplefilter("ignore")  # of texts that begin with [S2], and of speech that was cut
    run = Evaluation(options.model or demo_voice(), options.codec, options.kokoro, options.count)
    print(f"{len(run.sentences)} held-out sentences whose words the voice knows")
    for name in chosen:
        PARTS[name](run)


if __name__ == "__main__":
    main()
