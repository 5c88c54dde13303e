"""The voice that comes with the package: official layout, small, understood, and what a user without a model hears."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import parselmouth
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DacModel, DiaForConditionalGeneration

from bench.tools.pairs import their_rows
from dia_fast import Audio, Dia, demo_voice
from dia_fast.audio.codec import codec_for, load_codec
from dia_fast.checkpoint.demo import TEMPERATURE, nearest_words, unknown_words, unknown_words_remark, vocabulary
from dia_fast.cli import main
from dia_fast.integrations.transformers import accelerate
from dia_fast.model.delay import undo_delay
from dia_fast.text.tokenizer import encode_text
from examples.demo_voice.recognisers import score, sphinx
from examples.demo_voice.sentences import is_held_out, lines, sentence
from examples.demo_voice.sentences import vocabulary as taught
from examples.demo_voice.turns import words
from tests.helpers.codecs import assert_same_sound

TEXT = "[S1] The red book is in the kitchen. [S2] Thank you, please call four seven."


@pytest.fixture(scope="module")
def voice() -> Iterator[Dia]:
    with Dia.from_pretrained(demo_voice(), backend="torch", device="cpu") as dia:
        yield dia


def speak(voice: Dia, texts: list[str], **settings: object) -> list[np.ndarray]:
    spoken = voice.generate(texts, seed=3, max_new_tokens=400, temperature=TEMPERATURE, **settings)  # type: ignore[arg-type]
    assert isinstance(spoken, list)
    return [audio.samples for audio in spoken]


def held_out(count: int) -> list[str]:
    return [line.text for line in itertools.islice(lines(77, held_out=True, turns=1), count)]


def pitch(samples: np.ndarray) -> float:
    """The median in Hz, NaN if nothing is voiced."""
    frequencies = parselmouth.Sound(samples.astype(np.float64), 16_000).to_pitch().selected_array["frequency"]
    voiced = frequencies[frequencies > 0]
    return float(np.median(voiced)) if len(voiced) else float("nan")


def test_it_is_small_and_says_what_it_is() -> None:
    files = [file for file in demo_voice().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    card = (demo_voice() / "README.md").read_text(encoding="utf-8")
    for part in ("license: apache-2.0", "## Data", "## Licence", "## Limits", "## Words understood"):
        assert part in card


def test_transformers_loads_it_and_speaks_the_same_codes(voice: Dia) -> None:
    theirs = DiaForConditionalGeneration.from_pretrained(demo_voice(), dtype=torch.float32)
    settings = {"max_new_tokens": 80, "guidance_scale": 3.0, "top_k": 45}
    [rows] = their_rows(theirs, voice.config, [encode_text(TEXT)], **settings)
    expected = undo_delay(rows.int(), voice.config.delay_pattern, voice.config.decoder.eos_token_id)
    [codes] = voice.generate_codes(TEXT, do_sample=False, max_new_tokens=80)
    assert len(codes) > 60
    assert torch.equal(codes.long(), expected[: len(codes)].long())

    [again] = their_rows(accelerate(theirs), voice.config, [encode_text(TEXT)], **settings)
    assert torch.equal(again, rows)

    codec = DacModel.from_pretrained(demo_voice() / "codec", dtype=torch.float32)
    with torch.no_grad():
        sound = codec.decode(audio_codes=codes.long().T[None]).audio_values.flatten()
    assert_same_sound(voice.codec.decode(codes), sound, voice.codec)


def test_it_is_understood(voice: Dia) -> None:
    texts = held_out(16)
    hear = sphinx()
    share = score([words(text) for text in texts], [hear(sound) for sound in speak(voice, texts)])
    assert share >= 0.9


@pytest.mark.parametrize(("speaker", "low", "high"), [("[S1]", 80, 115), ("[S2]", 165, 215)])
def test_its_speakers_have_the_pitch_that_they_learnt(voice: Dia, speaker: str, low: float, high: float) -> None:
    texts = [text for text in held_out(24) if text.startswith(speaker)][:6]
    pitches = [pitch(sound) for sound in speak(voice, texts)]
    assert low < np.median(pitches) < high
    assert sum(low < each < high for each in pitches) >= 5


@pytest.mark.parametrize(("speaker", "low", "high"), [("[S1]", 80, 115), ("[S2]", 165, 215)])
def test_it_goes_on_in_the_voice_of_a_prompt(voice: Dia, speaker: str, low: float, high: float) -> None:
    text = f"{speaker} Please close the white box."
    [prompt] = speak(voice, [text])
    heard = prompt[: np.flatnonzero(np.abs(prompt) > 0.02)[-1] + 320]
    [sound] = speak(voice, [f"{text} The code is two five."], audio_prompt=[Audio(heard, 16_000)])
    assert 0.8 < len(sound) / 16_000 < 3.5
    assert low < pitch(sound) < high
    assert score([words("The code is two five.")], [sphinx()(sound)]) >= 0.6


def test_it_ends_by_itself(voice: Dia) -> None:
    [sound] = speak(voice, ["[S1] Please open the blue door."])
    assert 0.8 < len(sound) / 16_000 < 3.5


def test_a_stream_is_the_whole(voice: Dia) -> None:
    [whole] = speak(voice, [TEXT])
    stream = voice.stream(TEXT, seed=3, max_new_tokens=400, temperature=TEMPERATURE, chunk_seconds=0.2)
    chunks = [chunk.samples for chunk in stream]
    assert len(chunks) > 5
    assert_same_sound(np.concatenate(chunks), whole, voice.codec)


def test_speak_without_a_model_uses_it_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.wav"
    assert main(["speak", "[S1] Hello, elephant.", "-o", str(path), "--seed", "3", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "demo voice" in said.err and "nari-labs/Dia-1.6B-0626" in said.err
    assert "never learnt: elephant" in said.err and "--words" in said.err
    assert str(path) in said.out
    assert soundfile.info(path).samplerate == 16_000

    assert main(["speak", "[S1] Hello.", "-o", str(path), "--quiet", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_the_codec_beside_a_model_is_found() -> None:
    assert codec_for(demo_voice()) == str(demo_voice() / "codec")
    assert codec_for("nari-labs/Dia-1.6B-0626") == "descript/dac_44khz"
    assert codec_for(demo_voice(), "other") == "other"
    assert load_codec(codec_for(demo_voice())).hop_length == 320


@given(st.integers(0, 2**32))
def test_sentences_are_of_the_closed_vocabulary(seed: int) -> None:
    assert set(words(sentence(random.Random(seed)))) <= set(taught())


def test_held_out_sentences_are_in_no_training_recording() -> None:
    training = {said for line in itertools.islice(lines(1, held_out=False), 2000) for _, said in line.turns}
    tested = {said for line in itertools.islice(lines(1, held_out=True), 200) for _, said in line.turns}
    assert not training & tested
    assert all(map(is_held_out, tested)) and not any(map(is_held_out, training))


def test_unknown_words_are_told() -> None:
    assert vocabulary() == taught()
    assert unknown_words("[S1] The RED book, please! [S2] Zebra 7 zebra?") == ["Zebra", "7", "zebra"]
    assert unknown_words("[S1] Good morning.") == []
    assert unknown_words("[S1] 'Good' morning (the red book).") == ["(the red book)"]
    assert unknown_words("[S1] It's four o\N{RIGHT SINGLE QUOTATION MARK}clock_now.") == ["It's", "o'clock", "now"]


def test_sounds_are_told_as_they_stand() -> None:
    assert unknown_words("[S1] Yes (laughs), the book. [S2] (coughs) No (laughs).") == ["(laughs)", "(coughs)"]
    assert nearest_words("(the)") == []
    assert str(unknown_words_remark("[S1] Yes (laughs).")).endswith("never learnt: (laughs)")
    assert unknown_words("[S1] Call (four).") == ["(four)"] and unknown_words("[S1] Call (four 4).") == ["4"]


def test_the_nearest_known_words_are_told() -> None:
    assert nearest_words("kitchens")[0] == "kitchen"
    assert nearest_words("GREENER")[0] == "green"
    assert nearest_words("xylophon") == []
    assert unknown_words_remark("[S1] The red book. [S2] Good morning.") is None
    remark = unknown_words_remark("[S1] The kitchens xylophon the red book.")
    assert remark is not None
    assert remark.endswith("never learnt: kitchens (nearest: kitchen), xylophon")
    many = " ".join(f"qq{letter}qq" for letter in "abcdefg")
    assert str(unknown_words_remark(many, most=2)).endswith("never learnt: qqaqq, qqbqq and 5 more")


@given(st.text(max_size=30), st.integers(1, 4))
def test_nearest_words_are_known_ones(word: str, most: int) -> None:
    near = nearest_words(word, most)
    assert len(near) <= most and set(near) <= set(vocabulary())


@pytest.mark.parametrize("given", [[], ["--model", "demo"]])
def test_its_words_are_shown(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speak", "--words", *given]) == 0
    shown = capsys.readouterr().out
    assert shown.split() == vocabulary()
    assert max(map(len, shown.splitlines())) <= 100


def test_the_words_of_another_model_are_no_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speak", "--words", "--model", "nari-labs/Dia-1.6B-0626"]) == 2
    assert "nari-labs/Dia-1.6B-0626 takes any text" in capsys.readouterr().err
