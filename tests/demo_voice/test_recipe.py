"""The recipe of the demo voice at tiny sizes: texts, speech, codec, codes, dialogues, and stages that are resumed."""

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_fast.audio.codec import Codec, CodecConfig, load_codec, random_codec
from dia_fast.errors import InputError
from examples.demo_voice import build, codec, codes, speech, texts, turns
from examples.demo_voice.dialogues import END, GIVEN, PAUSE, Dialogue, Dialogues, joined
from examples.demo_voice.kokoro import RATE as SPOKEN_RATE
from examples.demo_voice.kokoro import Lexicon
from examples.demo_voice.stages import Stage, content
from examples.demo_voice.turns import DEFAULT_PAIR, HELD_OUT_VOICES, RATE, Turn

SMALL = CodecConfig(
    encoder_hidden_size=2,
    downsampling_ratios=(2, 4, 8, 8),
    decoder_hidden_size=32,
    hidden_size=8,
    n_codebooks=9,
    codebook_size=16,
    codebook_dim=4,
    sampling_rate=RATE,
)
SILENCE = torch.zeros(9, dtype=torch.int16)


def tone(text: str, voice: str, speed: float) -> np.ndarray:
    """A second or less for each text, other voices other pitches."""
    times = np.arange(int(SPOKEN_RATE * (0.2 + len(text) % 7 / 10) / speed)) / SPOKEN_RATE
    return (0.3 * np.sin(2 * np.pi * (100 + len(voice) * 20) * times)).astype(np.float32)


def some_turns(count: int, voices: tuple[str, ...], longest: int = 44) -> list[codes.TurnCodes]:
    draw = random.Random(5)
    return [
        codes.TurnCodes(voice, f"Turn {number}.", torch.full((draw.randint(32, longest), 9), number, dtype=torch.int16))
        for number, voice in zip(range(1, count + 1), itertools.cycle(voices), strict=False)
    ]


@given(st.integers(0, 2**32))
def test_texts_are_of_the_list(seed: int) -> None:
    assert set(turns.words(texts.turn(random.Random(seed)))) <= set(texts.vocabulary())


def test_some_sentences_are_words_in_any_order() -> None:
    draw = random.Random(1)
    made = [texts.loose(draw) for _ in range(2000)]
    assert {word for text in made for word in turns.words(text)} == set(texts.vocabulary())
    assert {len(turns.words(text)) for text in made} == set(range(3, 9))
    assert all(text[0].isupper() and text[-1] in ".?!" for text in made)
    row = " ".join(made)
    assert " I " in row and " Monday" in row and " monday" not in row
    assert not set(made) & set(texts.held_out_sentences())


def test_held_out_sentences_are_of_the_list_and_no_template_makes_them() -> None:
    sentences = texts.held_out_sentences()
    known = set(texts.vocabulary())
    assert len(set(sentences)) == len(sentences) >= 60
    assert [sentence for sentence in sentences if not set(turns.words(sentence)) <= known] == []
    made = {texts.sentence(draw) for draw in [random.Random(1)] for _ in range(20_000)}
    assert not made & set(sentences)
    assert texts.held_out_sentences(known - {"key"}) == [s for s in sentences if "key" not in turns.words(s)]


def test_some_texts_and_two_voices_are_held_out() -> None:
    said = [texts.turn(random.Random(number)) for number in range(2000)]
    share = sum(map(turns.text_is_held_out, said)) / len(said)
    assert 0.5 * turns.HELD_OUT < 100 * share < 2 * turns.HELD_OUT
    kept = next(text for text in said if turns.text_is_held_out(text))
    free = next(text for text in said if not turns.text_is_held_out(text))
    silent = np.zeros(1, np.float32)
    assert turns.of_training(Turn("af_heart", free, silent))
    assert not turns.of_training(Turn("af_heart", kept, silent))
    assert not turns.of_training(Turn(HELD_OUT_VOICES[0], free, silent))
    assert not set(HELD_OUT_VOICES) & set(DEFAULT_PAIR)


def test_pronunciations_of_a_plural_are_those_of_its_word() -> None:
    lexicon = Lexicon({"cup": "kˈʌp", "box": {"DEFAULT": "bˈɑks"}, "dog": "dˈɔɡ", "Anna": "ˈænə"})
    assert lexicon.text("Cups, boxes. Anna dogs!") == "kˈʌps, bˈɑksɪz. ˈænə dˈɔɡz!"
    with pytest.raises(KeyError, match="zebra"):
        lexicon.text("The zebra".replace("The ", ""))


def test_speech_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    calls = []

    def stopped(text: str, voice: str, speed: float) -> np.ndarray:
        calls.append(text)
        if len(calls) == speech.SHARD + 3:
            raise KeyboardInterrupt
        return tone(text, voice, speed)

    with pytest.raises(KeyboardInterrupt):
        speech.make(tmp_path / "a", stopped, 2 * speech.SHARD, seed=1)
    assert not (tmp_path / "a" / "turns.jsonl").exists()
    speech.make(tmp_path / "a", stopped, 2 * speech.SHARD, seed=1)
    assert len(calls) == 2 * speech.SHARD + 3
    speech.make(tmp_path / "b", tone, 2 * speech.SHARD, seed=1)
    assert (tmp_path / "a" / "turns.jsonl").read_bytes() == (tmp_path / "b" / "turns.jsonl").read_bytes()
    read, lines = turns.load_turns(tmp_path / "a"), (tmp_path / "a" / "turns.jsonl").read_text().splitlines()
    assert len(read) == len(lines) == 2 * speech.SHARD
    for turn, line in zip(read, map(json.loads, lines), strict=True):
        assert (turn.voice, turn.text) == (line["voice"], line["text"])
        assert abs(len(turn.samples) / RATE - (line["end"] - line["start"]) / SPOKEN_RATE) < 1e-3
        assert turn.samples.std() > 0.1
    assert len(turns.pcm(read)) == sum(len(turn.samples) + turns.GAP for turn in read)


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_compiled_forward", codec._snake_forward)
    monkeypatch.setattr(codec, "_compiled_backward", codec._snake_backward)


PLAN = codec.Plan(steps=8, begin=3, batch=2, shortest=512)


def small_sound() -> torch.Tensor:
    times = torch.arange(2 * RATE) / RATE
    return (8000 * torch.sin(2 * torch.pi * 150 * times)).short()


def test_a_codec_that_was_stopped_is_the_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_compiled: None
) -> None:
    whole = codec.train(small_sound(), tmp_path / "whole", PLAN, SMALL)
    monkeypatch.setattr(codec, "SAVE", 2)
    made, step = [], codec.Run.step

    def stopped(run: codec.Run, sound: torch.Tensor) -> tuple[float, float, float]:
        made.append(run.done)
        if len(made) == 6:
            raise KeyboardInterrupt
        return step(run, sound)

    monkeypatch.setattr(codec.Run, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        codec.train(small_sound(), tmp_path / "again", PLAN, SMALL)
    again = codec.train(small_sound(), tmp_path / "again", PLAN, SMALL)
    assert made == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    for (name, weight), other in zip(
        whole.network.state_dict().items(), again.network.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name
    assert load_codec(tmp_path / "again").config == SMALL


def test_a_codec_of_other_strides_is_a_start(tmp_path: Path, not_compiled: None) -> None:
    other = random_codec(replace(SMALL, downsampling_ratios=(2, 4, 4, 10), upsampling_ratios=(), codebook_size=8), 3)
    other.save_pretrained(tmp_path / "other")
    run = codec.Run(PLAN, SMALL, tmp_path / "other")
    mine, theirs = run.network.state_dict(), other.network.state_dict()
    assert torch.equal(mine["encoder.conv1.weight"], theirs["encoder.conv1.weight"])
    # The gain at frequency 0 of both kinds of strided convolutions is kept, but for what lies beyond the ends.
    wide, narrow = (held["encoder.block.2.conv1.weight"].sum(-1) for held in (mine, theirs))
    assert torch.allclose(wide, narrow, atol=1e-5)
    taps = [held["decoder.block.1.conv_t1.weight"] for held in (mine, theirs)]
    assert taps[0].shape[-1] == 16 and taps[1].shape[-1] == 8
    assert torch.allclose(taps[0].mean(-1), taps[1].mean(-1), atol=1e-5)


@pytest.fixture(scope="module")
def small_codec() -> Codec:
    return random_codec(SMALL, 1)


def test_a_turn_has_the_codes_that_it_has_in_a_dialogue(small_codec: Codec, tmp_path: Path) -> None:
    draw, hop = np.random.default_rng(1), small_codec.hop_length
    sounds = [np.pad(draw.normal(0, 0.2, size), 3000).astype(np.float32) for size in (hop * 9, hop * 7 - 100)]
    said = [Turn("af_heart", f"Turn {number}.", sound) for number, sound in enumerate(sounds)]
    codes.write([(turn, 0.0) for turn in said], small_codec, tmp_path / "codes.pt")
    read, silence = codes.read(tmp_path / "codes.pt")
    assert [(turn.voice, turn.text) for turn in read] == [(turn.voice, turn.text) for turn in said]
    assert [len(turn.codes) for turn in read] == [9 + 2 * codes.KEPT, 7 + 2 * codes.KEPT]
    gap = 2 * codes.AROUND
    quiet = np.zeros(gap * hop, np.float32)
    row = np.concatenate([part for sound in sounds for part in (quiet, codes.trimmed(sound, hop))] + [quiet])
    whole = small_codec.encode(torch.from_numpy(row)).short()
    first, second = (turn.codes for turn in read)
    assert torch.equal(whole[gap - codes.KEPT :][: len(first)], first)
    assert torch.equal(whole[2 * gap + 9 - codes.KEPT :][: len(second)], second)
    assert torch.equal(whole[gap + 9 + gap // 2], silence)


def test_codes_go_on_where_they_were_stopped(
    small_codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [(Turn("af_heart", f"Turn {number}.", spoken(0.1 + number / 20)), 0.0) for number in range(7)]
    codes.write(said, small_codec, tmp_path / "whole.pt")
    monkeypatch.setattr(codes, "SAVE", 2)
    done, encoded = list[str](), codes.encoded

    def stopped(turn: Turn, codec: Codec, late: float = 0.0) -> codes.TurnCodes:
        done.append(turn.text)
        if len(done) == 6:
            raise KeyboardInterrupt
        return encoded(turn, codec, late)

    monkeypatch.setattr(codes, "encoded", stopped)
    with pytest.raises(KeyboardInterrupt):
        codes.write(said, small_codec, tmp_path / "again.pt")
    codes.write(said, small_codec, tmp_path / "again.pt")
    assert [text[5] for text in done] == list("012345456")
    whole, again = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "again"))
    assert torch.equal(whole["codes"], again["codes"]) and whole["texts"] == again["texts"]
    assert not (tmp_path / "again.part").exists()


def spoken(*lengths: float, pause: float = 0.2) -> np.ndarray:
    """Tones of so many seconds with pauses between them."""
    quiet = np.zeros(int(pause * RATE), np.float32)
    parts = [0.3 * np.sin(np.arange(int(RATE * length)) / 5).astype(np.float32) for length in lengths]
    return np.concatenate([part for tone in parts for part in (quiet, tone)] + [quiet])


def test_a_turn_is_cut_where_it_pauses_between_sentences() -> None:
    whole = Turn("af_heart", "Yes, it is. Where is my big book? Here.", spoken(0.9, 1.8, 0.4))
    parts = turns.sentences(whole)
    assert [part.text for part in parts] == ["Yes, it is.", "Where is my big book?", "Here."]
    assert [len(codes.trimmed(part.samples, 1)) / RATE for part in parts] == pytest.approx([0.9, 1.8, 0.4], abs=0.002)
    assert np.array_equal(np.concatenate([part.samples for part in parts]), whole.samples)
    for kept in (
        replace(whole, samples=spoken(3.1)),
        replace(whole, samples=spoken(0.9, 1.8, 0.4, pause=0.05)),
        replace(whole, samples=spoken(2.4, 0.3, 0.4)),
        replace(whole, samples=np.zeros(RATE, np.float32)),
        replace(whole, text="Yes, it is"),
    ):
        assert turns.sentences(kept) == [kept]


def test_variants_are_of_training_alone_and_other_pitches_are_other_speakers(small_codec: Codec) -> None:
    text = next(text for text in (f"The {word}." for word in texts.vocabulary()) if not turns.text_is_held_out(text))
    turn = Turn("af_heart", text, spoken(0.8))
    made = codes.varied(turn)
    assert [one.voice for one, _ in made] == ["af_heart", "af_heart", "af_heart@1.07", "af_heart@0.94"]
    lengths = [len(codes.trimmed(one.samples, 1)) / RATE for one, _ in made]
    assert lengths == pytest.approx([0.8, 0.8, 0.8 / 1.07, 0.8 / 0.94], abs=0.01)
    assert codes.varied(replace(turn, voice=HELD_OUT_VOICES[0])) == [(replace(turn, voice=HELD_OUT_VOICES[0]), 0.0)]
    first, late = (codes.encoded(one, small_codec, by).codes for one, by in made[:2])
    assert 0 <= len(late) - len(first) <= 1 and not torch.equal(first, late[: len(first)])


def test_sentences_of_one_voice_make_a_turn() -> None:
    made = Dialogues(some_turns(40, DEFAULT_PAIR), SILENCE, 700).draw(1, 200, (1,))
    counts = [one.text.count("Turn") for one in made]
    assert set(counts) == {1, 2, 3} and all(len(one.voices) == 1 for one in made)
    for one in made:
        assert one.spoken[0][1] <= len(one.codes) - codes.KEPT
        spoken = len([0 for code, _ in itertools.groupby(one.codes[:, 0].tolist()) if code])
        assert spoken == one.text.count("Turn")
    assert all(len(one.codes) <= 60 for one in Dialogues(some_turns(40, DEFAULT_PAIR), SILENCE, 60).draw(1, 50, (1,)))


def test_a_joined_dialogue_has_its_turns_whole_and_pauses_between() -> None:
    first, second, third = some_turns(3, ("am_michael", "bf_emma"))
    made = joined([(0, first), (1, second), (0, third)], SILENCE, random.Random(1))
    assert made.text == "[S1] Turn 1. [S2] Turn 2. [S1] Turn 3."
    kinds = [(int(code), len(list(group))) for code, group in itertools.groupby(made.codes[:, 0].tolist())]
    spoken = [kind for kind in kinds if kind[0]]
    assert spoken == [(number, len(turn.codes)) for number, turn in enumerate((first, second, third), 1)]
    pauses = [frames for code, frames in kinds[:-1] if not code]
    assert len(pauses) == 2 and all(PAUSE[0] <= frames <= PAUSE[1] for frames in pauses)
    assert len(made.codes) == len(made.learnt)
    # [S2] is not the default voice: how it begins is given, once.
    given = (~made.learnt).nonzero()[:, 0]
    start = len(first.codes) + pauses[0]
    assert given.tolist() == list(range(start, start + codes.KEPT + GIVEN))


@given(st.integers(0, 2**20), st.integers(60, 300))
def test_dialogues_alternate_two_voices_and_fit(seed: int, longest: int) -> None:
    source = Dialogues(some_turns(40, (*DEFAULT_PAIR, "bf_emma", "bm_george")), SILENCE, longest)
    for made in source.draw(seed, 4):
        assert len(made.codes) <= longest
        assert 1 <= len(made.voices) <= 8
        assert all(voice == made.voices[number % 2] for number, voice in enumerate(made.voices))
        assert made.text.count("[S1]") + made.text.count("[S2]") == len(made.voices)
        frames = made.learnt.sum()
        tags = [int(tag) - 1 for tag in re.findall(r"\[S(\d)\]", made.text)]
        if made.voices == tuple(DEFAULT_PAIR[tag] for tag in tags):
            assert frames == len(made.codes)
        else:
            assert frames < len(made.codes)
    again, other = (source.draw(number, 4) for number in (seed, seed + 1))
    assert [made.text for made in source.draw(seed, 4)] == [made.text for made in again]
    assert [made.text for made in again] != [made.text for made in other]


def test_the_default_pair_speaks_half_of_the_dialogues_and_up_to_eight_turns() -> None:
    source = Dialogues(some_turns(400, (*DEFAULT_PAIR, "bf_emma", "bm_george", "af_sarah")), SILENCE, 700)
    made: list[Dialogue] = source.draw(1, 600)
    default = [one for one in made if set(one.voices) <= set(DEFAULT_PAIR)]
    assert 0.45 < len(default) / len(made) < 0.65
    assert {len(one.voices) for one in made} == {1, 2, 3, 4, 5, 6, 8}
    endings = {int(one.codes[-1 - END[1] :, 0].eq(0).sum()) for one in made}
    assert endings == set(range(END[0], END[1] + 1))


def test_turns_of_one_voice_are_no_dialogue() -> None:
    turns = some_turns(4, ("af_heart",)) + [
        replace(turn, codes=turn.codes.repeat(9, 1)) for turn in some_turns(2, ("b",))
    ]
    with pytest.raises(InputError, match="turns of at most 90 frames are of 1 voices"):
        Dialogues(turns, SILENCE, 90 + END[1])


def counting(result: Path, source: Path, calls: list[str], stop: bool = False) -> Stage:
    def make() -> None:
        calls.append(source.read_text())
        result.with_name("part").write_text("begun")
        if stop:
            raise KeyboardInterrupt
        result.write_text(source.read_text())

    return Stage("one", result, (source,), {"seed": (1, 2)}, make, (result.with_name("part"),))


def test_a_stage_is_made_again_only_of_other_things(tmp_path: Path) -> None:
    source, result, calls, records = tmp_path / "source", tmp_path / "result", list[str](), tmp_path / "records"
    source.write_text("a")
    assert counting(result, source, calls).run(records)
    assert not counting(result, source, calls).run(records)
    source.touch()
    assert not counting(result, source, calls).run(records)
    source.write_text("b")
    assert counting(result, source, calls).run(records)
    result.unlink()
    assert counting(result, source, calls).run(records)
    assert replace(counting(result, source, calls), settings={"seed": (1, 3)}).run(records)
    assert calls == ["a", "b", "b", "b"]


def test_a_stopped_stage_keeps_its_parts_unless_it_begins_with_other_things(tmp_path: Path) -> None:
    source, result, records = tmp_path / "source", tmp_path / "result", tmp_path / "records"
    part, seen = tmp_path / "part", list[bool]()
    source.write_text("a")

    def run(stop: bool) -> None:
        stage = counting(result, source, [], stop)

        def make() -> None:
            seen.append(part.exists())
            stage.make()

        replace(stage, make=make).run(records)

    for text in ("a", "a", "b"):
        source.write_text(text)
        with pytest.raises(KeyboardInterrupt):
            run(stop=True)
    run(stop=False)
    assert seen == [False, True, False, True]
    assert result.read_text() == "b"


def test_the_content_of_a_folder_is_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = content(tmp_path)
    assert content(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert content(tmp_path) != first
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "a").write_text("2")
    assert content(tmp_path) != first


def test_every_stage_reads_what_earlier_ones_make(tmp_path: Path) -> None:
    made = build.stages(tmp_path, tmp_path / "voice")
    assert [stage.name for stage in made] == ["kokoro", "speech", "codec", "codes", "untrained", "model", "voice"]
    there = set[Path]()
    for stage in made:
        assert set(stage.reads) <= there
        there |= {stage.result, stage.result.parent}
        json.dumps(stage.settings)
    given = build.stages(tmp_path, tmp_path / "voice", spoken=tmp_path / "mine")
    assert given[0].name == "codec" and given[0].reads == (tmp_path / "mine",)
    given = build.stages(tmp_path, tmp_path / "voice", spoken=tmp_path / "mine", trained=tmp_path / "theirs")
    assert given[0].name == "codes" and given[0].reads == (tmp_path / "mine", tmp_path / "theirs")
    assert given[-1].reads[-1] == tmp_path / "theirs"
