"""The measures of `make eval-voice`, on sounds and texts for which they are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dia_fast import Dia, demo_voice
from dia_fast.audio.audio import Audio
from dia_fast.generation.outcome import Outcome, Segment
from dia_fast.text.tokenizer import spoken_seconds
from examples.demo_voice import evaluate
from examples.demo_voice.recognisers import RATE, score, spelled
from examples.demo_voice.texts import held_out_sentences
from examples.demo_voice.turns import text_is_held_out, words


def voiced(pitch: float, seconds: float = 1.0, tilt: float = 1.0) -> np.ndarray:
    """Harmonics whose level falls with their number."""
    times = np.arange(int(RATE * seconds)) / RATE
    harmonics = range(1, int(RATE / 2 / pitch))
    sound = sum(np.sin(2 * np.pi * pitch * number * times) / number**tilt for number in harmonics)
    return 0.3 * sound / np.abs(sound).max()


def test_dialogues_alternate_and_are_the_same_for_the_same_seed() -> None:
    sentences = held_out_sentences()
    made = evaluate.dialogues(sentences, 8, 5)
    assert made == evaluate.dialogues(sentences, 8, 5) != evaluate.dialogues(sentences, 8, 5, seed=1)
    for script in made:
        assert [tag for tag, _ in script.turns] == [0, 1] * 4
        assert len({sentence for _, sentence in script.turns}) == 8
    assert made[0].text.startswith(f"[S1] {made[0].turns[0][1]} [S2] ")
    assert evaluate.dialogues(sentences[:3], 8, 1)[0].text.count("[S2]") == 4


@given(st.floats(1, 90), st.sampled_from([(0,), (1,), (0, 1)]))
def test_a_long_script_lasts_as_long_as_it_is_asked_for(seconds: float, tags: tuple[int, ...]) -> None:
    script = evaluate.long_script(held_out_sentences(), seconds, tags)
    said = [sentence for _, sentence in script.turns]
    assert sum(map(spoken_seconds, said)) >= seconds > sum(map(spoken_seconds, said[:-1]))
    assert {tag for tag, _ in script.turns} <= set(tags)


@pytest.mark.parametrize(("kind", "low", "high"), [("none", -9, 3), ("click", 20, 60), ("burst", -9, 60)])
def test_a_joint_that_is_loud_is_seen(kind: str, low: float, high: float) -> None:
    sound = voiced(120, 2.0, tilt=2.0)
    sound[RATE - 400 : RATE + 400] *= 0.5
    if kind == "click":
        sound[RATE] = 0.9
    if kind == "burst":
        sound[RATE : RATE + 160] = np.random.default_rng(1).uniform(-1, 1, 160)
    loud, step = evaluate.joint_levels(sound, [RATE])
    assert low < step < high
    assert (loud > 6) is (kind == "burst")


def test_without_a_joint_there_is_no_level() -> None:
    assert np.isnan(evaluate.joint_levels(voiced(120), [])).all()


def test_pitch_and_its_drift() -> None:
    low, high = (evaluate.median_pitch(voiced(pitch)) for pitch in (110, 220))
    assert low == pytest.approx(110, rel=0.02)
    assert evaluate.semitones(low, high) == pytest.approx(12, abs=0.2)
    assert np.isnan(evaluate.median_pitch(np.zeros(RATE))) and np.isnan(evaluate.median_pitch(np.zeros(10)))


def test_a_speaker_is_nearest_to_itself() -> None:
    speakers = {(pitch, tilt): voiced(pitch, tilt=tilt) for pitch in (110, 190) for tilt in (1.0, 2.0)}
    references = {name: evaluate.timbre(sound) for name, sound in speakers.items()}
    for pitch, tilt in speakers:
        mine = evaluate.timbre(np.concatenate([np.zeros(RATE), 0.5 * voiced(pitch * 1.03, 0.7, tilt * 1.05)]))
        assert min(references, key=lambda name: np.abs(references[name] - mine).mean()) == (pitch, tilt)


def test_segments_follow_each_other() -> None:
    segments = tuple(Segment("Yes.", "end", frames, (1,)) for frames in (10, 0, 5))
    audio = Audio(np.zeros(15 * 320, np.float32), RATE, outcome=Outcome(segments))
    assert evaluate.segments_of(audio, 320) == [(0, 3200), (3200, 3200), (3200, 4800)]


def test_held_out_turns_of_templates_are_of_known_words() -> None:
    every = evaluate.template_turns(None, 20)
    assert len(every) == 20 and every == evaluate.template_turns(None, 20) != evaluate.template_turns(None, 20, seed=1)
    assert all(map(text_is_held_out, every))
    known = set(words(" ".join(every[:10])))
    some = evaluate.template_turns(known, 5)
    assert some and all(set(words(text)) <= known for text in some)
    assert evaluate.template_turns(["hello"], 2) == []


def test_silent_segments_are_counted() -> None:
    sound = np.concatenate([voiced(120), np.zeros(RATE), voiced(120)])
    spoken = evaluate.Spoken(sound, ((0, RATE), (RATE, 2 * RATE), (2 * RATE, 2 * RATE), (2 * RATE, 3 * RATE)))
    assert spoken.silent == 2 and [len(part) for part in spoken.parts] == [RATE, RATE, 0, RATE]


def evaluation(count: int) -> evaluate.Evaluation:
    """One of the shipped voice, without recognisers."""
    run = evaluate.Evaluation.__new__(evaluate.Evaluation)
    run.model, run.codec_name, run.count, run.recognisers = demo_voice(), "auto", count, {}
    run.dia = Dia.from_pretrained(run.model)
    run.rate = run.dia.codec.sample_rate
    listed = (run.model / "vocabulary.txt").read_text(encoding="utf-8").split()
    run.sentences = held_out_sentences(listed)
    return run


def test_a_long_script_is_the_same_as_a_stream() -> None:
    run = evaluation(1)
    text = evaluate.long_script(run.sentences, 24.0).text
    whole, stream = (
        evaluate.long_form(run, run.dia, text, streamed=streamed, max_new_tokens=50) for streamed in (False, True)
    )
    assert whole.segments == stream.segments and len(whole.segments) > 1
    assert whole.segments[-1][1] == len(whole.sound) == len(stream.sound)
    assert np.abs(whole.sound - stream.sound).max() < 1e-3


def test_every_door_speaks_as_python_does(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi", reason="the extra server is not installed")
    evaluate.doors(evaluation(10))
    lines = capsys.readouterr().out.splitlines()
    shares = [line.split("|")[-2].strip() for line in lines if line.startswith("| ")]
    assert shares == ["as in Python", "2 of 2", "2 of 2", "2 of 2"]


def test_other_sounds_are_not_the_same() -> None:
    sound = Audio(voiced(120).astype(np.float32), RATE)
    assert evaluate.is_same(sound, Audio(np.round(sound.samples * 32767).astype(np.float32) / 32768, RATE))
    for other in (Audio(sound.samples[:-1], RATE), Audio(sound.samples, 8000), Audio(sound.samples * 0.99, RATE)):
        assert not evaluate.is_same(sound, other)


@pytest.mark.parametrize(
    ("heard", "digits", "found"),
    [
        (["the", "449"], True, "the four four nine"),
        (["the", "449"], False, "the four four nine"),
        (["83"], True, "eight three"),
        (["83"], False, "eighty three"),
        (["80", "11", "0", "07"], False, "eighty eleven zero zero seven"),
    ],
)
def test_numbers_are_read_in_both_ways(heard: list[str], digits: bool, found: str) -> None:
    assert " ".join(spelled(heard, digits=digits)) == found


def test_scores_count_words_and_take_what_sounds_alike_for_the_same() -> None:
    said = [["the", "code", "is", "eight", "three"], ["eighty", "three", "dollars"]]
    assert score(said, [["the", "code", "is", "83"], ["83", "dollars"]]) == 1.0
    assert score(said, [["the", "coat", "is", "83"], ["83"]]) == pytest.approx(1 - 2 / 8)
    assert score([["two", "grey", "neighbours"]], [["to", "gray", "neighbours"]]) == 1.0
