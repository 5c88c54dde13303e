"""Measures the demo voice: words understood in sentences, dialogues and long scripts, joints, drift, cloning.

    python -m examples.demo_voice.evaluate KOKORO [--model FOLDER] [--count 60] [--only dialogues,scripts]

Two offline recognisers hear sentences that were written by hand, `held_out.txt`, those of them whose words the voice
knows. Beside each score is that of the same text as Kokoro speaks it, and of that through the codec. KOKORO: the
folder of Kokoro's model; fetched first if it is missing. `pip install "dia-fast[voice]"` brings what this needs.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
import soxr
import torch

from dia_fast import Audio, Dia, demo_voice
from dia_fast.checkpoint.demo import TEMPERATURE
from dia_fast.text.tokenizer import spoken_seconds
from examples.demo_voice import kokoro
from examples.demo_voice.codes import trimmed
from examples.demo_voice.recognisers import RATE, score, sphinx, whisper
from examples.demo_voice.texts import held_out_sentences, turn
from examples.demo_voice.turns import DEFAULT_PAIR, HELD_OUT_VOICES, text_is_held_out, words

SEED = 11
PAUSE = RATE * 3 // 10  # samples between the turns of a recording
SOFT = 0.01  # what is softer is no speech
WINDOW = RATE // 100  # samples in which the level is measured
COMMAND = (sys.executable, "-m", "dia_fast")
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


def template_turns(known: Collection[str] | None, count: int, seed: int = SEED) -> list[str]:
    """Turns that templates make and a hash keeps from training; with `known`, those of known words. Maybe fewer."""
    draw, found = random.Random(seed), list[str]()
    for _ in range(400 * count):
        text = turn(draw, share=0.0)
        if len(found) < count and text_is_held_out(text) and (known is None or set(words(text)) <= set(known)):
            found.append(text)
    return found


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
        self.known = listed.read_text(encoding="utf-8").split() if listed.is_file() else None
        self.sentences = held_out_sentences(self.known)
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
    made = template_turns(run.known, run.count)
    scripts = [Script(((number % 2, text),)) for number, text in enumerate(made)]
    if scripts:
        originals = [run.original(script) for script in scripts]
        run.head(f"{len(scripts)} held-out turns of templates, {sum(len(script.words) for script in scripts)} words")
        run.row("original", scripts, originals)
        run.row("through the codec", scripts, [run.through(sound) for sound in originals])
        run.row("generated, guidance 3", scripts, run.spoken(scripts, guidance_scale=3.0))


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


@dataclass(frozen=True)
class Spoken:
    """A long script as it was spoken: the sound at `RATE`, and its segments in samples of it."""

    sound: np.ndarray
    segments: tuple[tuple[int, int], ...]

    @property
    def parts(self) -> list[np.ndarray]:
        return [self.sound[first:last] for first, last in self.segments]

    @property
    def silent(self) -> int:
        """Segments in which nothing is heard."""
        return sum(1 for part in self.parts if not len(part) or np.abs(part).max() < SOFT)


def long_form(run: Evaluation, dia: Dia, text: str, *, streamed: bool = False, **settings: Any) -> Spoken:
    """A script that `split="auto"` cuts, as a whole or as a stream."""
    settings = SETTINGS | settings
    if streamed:
        stream = dia.stream(text, split="auto", **settings)
        samples = np.concatenate([np.asarray(chunk.samples) for chunk in stream])
        audio = Audio(samples, dia.codec.sample_rate, outcome=stream.outcome)
    else:
        audio = cast(Audio, dia.generate(text, split="auto", **settings))
    spans = segments_of(audio, dia.codec.hop_length)
    at = tuple((first * RATE // run.rate, last * RATE // run.rate) for first, last in spans)
    return Spoken(at_rate(np.asarray(audio.samples, np.float64), run.rate), at)


def scripts(run: Evaluation, seconds: float = 60.0, seeds: int = 3) -> None:
    """Scripts of 60 s through split="auto": words, silent segments, length, joints, and the drift of pitch."""
    prompt = dialogues(run.sentences, 2, 1, seed=1)[0]
    [voice] = run.spoken([prompt])
    given = {"audio_prompt": Audio(voice[: _end(voice)].astype(np.float32), RATE), "prompt_text": prompt.text}
    kinds: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        ("dialogue", (0, 1), {}), ("dialogue, as a stream", (0, 1), {"streamed": True}),
        ("dialogue, int8", (0, 1), {"dia": run.int8}), ("dialogue, in a given voice", (0, 1), given),
        ("dialogue, in a given voice, as a stream", (0, 1), {"streamed": True, **given}),
        ("only [S1]", (0,), {}), ("only [S2]", (1,), {}),
    ]  # fmt: skip
    run.head(f"scripts of {seconds:g} s, {seeds} seeds", "length", "silent", "joints", "steps at joints", "drift")
    for name, tags, settings in kinds:
        script = long_script(run.sentences, seconds, tags)
        original = run.original(script)
        if not settings:
            run.row(f"{name}, original", [script], [original], *5 * [""])
            run.row(f"{name}, through the codec", [script], [run.through(original)], *5 * [""])
        settings = {"dia": run.dia, **settings}
        made = [long_form(run, text=script.text, seed=seed, **settings) for seed in range(SEED, SEED + seeds)]
        joints = np.array([joint_levels(each.sound, (last for _, last in each.segments[:-1])) for each in made])
        drifts = [
            semitones(median_pitch(each.parts[0]), median_pitch(each.parts[-1])) for each in made if len(tags) == 1
        ]
        loud, steps = np.nanmax(joints, 0) if np.isfinite(joints).any() else (np.nan, np.nan)
        drift = f"{np.nanmax(np.abs(drifts)):.1f} semitones" if np.isfinite(drifts).any() else ""
        length = np.mean([len(each.sound) for each in made]) / len(original)
        silent = f"{sum(each.silent for each in made)} of {sum(len(each.segments) for each in made)}"
        more = (f"{100 * length:.0f} %", silent, f"{loud:.1f} dB", f"{steps:.1f} dB", drift)
        run.row(name, [script] * seeds, [each.sound for each in made], *more)


def long_scripts(run: Evaluation) -> None:
    """The same for scripts of 5 minutes."""
    scripts(run, seconds=300.0, seeds=1)


def doors(run: Evaluation) -> None:
    """Dialogues of 2 turns by `dia-fast batch` and `dia-fast serve`, which speak as Python does for the same seed."""
    said = dialogues(run.sentences, 2, max(2, run.count // 5))
    given = [{"text": script.text, **SETTINGS, "seed": SEED + number} for number, script in enumerate(said)]
    model = ["--model", str(run.model), "--codec", run.codec_name, "--quiet"]
    made = {"Python": [cast(Audio, run.dia.generate(**each)) for each in given]}
    with tempfile.TemporaryDirectory() as place:
        items = Path(place, "items.jsonl")
        items.write_text("".join(json.dumps(each) + "\n" for each in given), encoding="utf-8")
        subprocess.run([*COMMAND, "batch", str(items), place, *model], check=True)
        made["dia-fast batch"] = [loaded(file) for file in sorted(Path(place).glob("*.wav"))]
    with serving(*model) as address:
        made["dia-fast serve"] = [requested(address, **each) for each in given]
    run.head(f"{len(said)} dialogues of 2 turns", "as in Python")
    for name, sounds in made.items():
        same = sum(1 for mine, other in zip(made["Python"], sounds, strict=True) if is_same(mine, other))
        run.row(name, said, [at_rate(sound.samples, sound.sample_rate) for sound in sounds], f"{same} of {len(said)}")


def loaded(path: Path) -> Audio:
    """The sound of a file, at its own rate."""
    samples, rate = soundfile.read(path, dtype="float32")
    return Audio(samples, rate)


def is_same(first: Audio, second: Audio) -> bool:
    """Tell whether two sounds differ by no more than what 16 bits cost."""
    if (first.sample_rate, len(first.samples)) != (second.sample_rate, len(second.samples)):
        return False
    return bool(np.abs(np.asarray(first.samples).clip(-1, 1) - np.asarray(second.samples)).max() < 2 / 32768)


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The address of a server that runs until the end of the block. Raises RuntimeError if it does not start."""
    command = [*COMMAND, "serve", "--port", "0", *(option for option in options if option != "--quiet")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = list[str]()
        for line in process.stderr:
            if found := re.search(r"(http://\S+?:\d+) serves", line):
                break
            lines.append(line)
        else:
            raise RuntimeError(f"the server does not start: {''.join(lines)}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        for _ in range(600):  # it answers before its model is loaded
            with suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{found[1]}/ready"):
                break
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def requested(address: str, text: str, **settings: Any) -> Audio:
    """A text as the server speaks it."""
    fields = {"input": text, "response_format": "wav", **settings}
    header = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{address}/v1/audio/speech", json.dumps(fields).encode(), header)
    with tempfile.NamedTemporaryFile(suffix=".wav") as file, urllib.request.urlopen(asked) as answer:
        file.write(answer.read())
        file.flush()
        return loaded(Path(file.name))


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
    "sentences": sentences, "dialogues": conversations, "scripts": scripts, "long": long_scripts, "doors": doors,
    "cloning": cloning,
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
