"""Speed, silence and the best part of a recording."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_fast.api import Dia
from dia_fast.audio import editing
from dia_fast.audio.audio import Audio
from dia_fast.cli import main
from dia_fast.errors import AudioWarning, InputError
from dia_fast.generation.prompts import cut_prompts
from dia_fast.generation.sampling_params import named_seed
from dia_fast.text.tokenizer import with_tag
from tests.helpers.front import TEXT, make_codec, make_model

RATE = 16_000


def sound(*seconds: float, level: float = 0.3, hum: float = 0.0) -> Audio:
    """Tone and silence by turns, a tone first; hum: level of the silence."""
    time = np.arange(round(sum(seconds) * RATE)) / RATE
    edges = np.cumsum([0.0, *seconds])
    loud = np.zeros(len(time), np.bool_)
    for low, high in zip(edges[:-1:2], edges[1::2], strict=False):
        loud |= (time >= low) & (time < high)
    return Audio((np.where(loud, level, hum) * np.sin(2 * np.pi * 220 * time)).astype(np.float32), RATE, 7)


@pytest.mark.parametrize("speed", [0.3, 0.5, 0.9, 1.5, 4.0])
def test_speed_keeps_the_pitch(speed: float) -> None:
    """To a window of the filter, 1/24 s, of each of its stages."""
    pytest.importorskip("av", reason="needs the extra media")
    tone = sound(4.0)
    found = editing.at_speed(tone, speed)
    assert found.duration == pytest.approx(4 / speed, abs=(1 + speed**-0.5) / 24) and (
        found.seed,
        found.sample_rate,
    ) == (7, RATE)
    spectrum = np.abs(np.fft.rfft(found.samples))
    assert np.fft.rfftfreq(len(found.samples), 1 / RATE)[spectrum.argmax()] == pytest.approx(220, abs=3)


def test_speeds_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    tone = sound(0.1)
    assert editing.at_speed(tone, 1) is tone
    for wrong in (0, 0.2, 5, float("nan"), "2", True):
        with pytest.raises(InputError, match="speed must be"):
            editing.checked_speed(wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(editing, "has_media", lambda: False)
    assert editing.checked_speed(1) == 1
    with pytest.raises(InputError, match=r"dia-fast\[media\]"):
        editing.checked_speed(1.5)


@pytest.mark.parametrize("hum", [0.0, 0.003])
def test_silence_is_cut(hum: float) -> None:
    audio = sound(0.0, 1.0, 2.0, 3.0, 1.0, 0.5, 1.0, 1.5, hum=hum)
    found = editing.without_silence(audio)
    assert found.duration == pytest.approx(2 + 0.4 + 1 + 0.5 + 1 + 0.1, abs=0.05)
    assert np.square(found.samples).sum() == pytest.approx(np.square(audio.samples).sum(), rel=0.02)
    assert editing.without_silence(found).duration == pytest.approx(found.duration, abs=0.03)
    quiet = Audio(np.zeros(900, np.float32), RATE)
    for same in (quiet, Audio(np.zeros(0, np.float32), RATE)):
        assert editing.without_silence(same) is same


@given(st.lists(st.floats(0, 1.2), max_size=6), st.floats(0.001, 1.0))
@settings(max_examples=40, deadline=None)
def test_silence_of_any_sound(seconds: list[float], level: float) -> None:
    audio = sound(*seconds, level=level)
    found = editing.without_silence(audio)
    assert len(found.samples) <= len(audio.samples) and np.isfinite(found.samples).all()
    assert np.square(found.samples).sum() >= 0.9 * np.square(audio.samples).sum()


def test_the_best_part_lies_between_pauses() -> None:
    audio = sound(3.0, 6.0, 8.0, 0.5, 9.0, 5.0, 4.0)  # 8 + 9 s of speech begin at 9 s
    part, start = editing.best_part(audio)
    assert start == pytest.approx(8.92, abs=0.02) and part.duration == pytest.approx(17.66, abs=0.04)
    assert np.square(part.samples).sum() == pytest.approx(17 * RATE * 0.045, rel=0.01)
    short = sound(15.0)
    assert editing.best_part(short) == (short, 0.0)
    whole, start = editing.best_part(sound(31.0))
    assert (whole.duration, start) == (20.0, 0.0)


@given(st.lists(st.floats(0.05, 9), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_any_recording_has_a_best_part(seconds: list[float]) -> None:
    audio = sound(*seconds)
    part, start = editing.best_part(audio)
    assert part.duration <= 20 and (part.duration >= 10 or part is audio)
    first = round(start * RATE)
    assert np.array_equal(part.samples, audio.samples[first : first + len(part.samples)])


def test_prompts_are_cut_with_a_warning(tmp_path: Path) -> None:
    long, short, codes = sound(8.0, 1.0, 18.0), sound(3.0), np.zeros((4, 9), np.int64)
    soundfile.write(tmp_path / "long.wav", long.samples, RATE)
    for prompt in (long, str(tmp_path / "long.wav"), (long.samples, RATE)):
        with pytest.warns(AudioWarning, match=r"27\.0 s long and was cut to the seconds from 8\.9 to 27\.0"):
            cut = cut_prompts(prompt)
        assert cut.duration == pytest.approx(18.08, abs=0.02)
    assert cut_prompts([short, None, codes]) == [short, None, codes]


def test_tags_and_names() -> None:
    assert with_tag(" Hello.") == "[S1] Hello." and with_tag(b"Hello.") == b"[S1] Hello."
    for same in ("[S1] Hello.", " [S2] Hello.", b"[S2] Hello."):
        assert with_tag(same) is same
    assert named_seed("Anna") == named_seed(" anna ") != named_seed("Bert") and 0 <= named_seed("Anna") < 2**63
    for wrong in ("", "  ", "17", "-1"):
        with pytest.raises(InputError, match="name of a voice"):
            named_seed(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_model(tmp_path_factory.mktemp("model"))
    make_codec(place / "codec")
    return place


def test_options_of_generate(folder: Path) -> None:
    pytest.importorskip("av", reason="needs the extra media")
    with Dia.from_pretrained(folder) as dia:
        options: dict[str, Any] = {"seed": "Anna", "max_new_tokens": 60}
        plain = dia.generate(TEXT, **options)
        assert isinstance(plain, Audio) and plain.seed == named_seed("anna")
        fast = dia.generate(TEXT.removeprefix("[S1] "), speed=2.0, add_tag=True, **options)
        assert np.array_equal(fast.samples, editing.at_speed(plain, 2.0).samples)
        [trimmed] = dia.generate([TEXT], trim_silence=True, **options)
        assert np.array_equal(trimmed.samples, editing.without_silence(plain).samples)
        for wrong in ({"speed": 9}, {"trim_silence": 1}, {"add_tag": "yes"}, {"cut_prompt": None}, {"seed": "7"}):
            with pytest.raises(InputError, match=next(iter(wrong))):
                dia.generate(TEXT, **options | wrong)


def test_options_of_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av", reason="needs the extra media")
    speak = ["speak", "Hear what?", "-m", str(folder), "--max-new-tokens", "60", "--seed", "Anna", "-q", "--add-tag"]
    for name, more in {"a": [], "b": ["--speed", "0.5"], "c": ["--trim-silence"]}.items():
        assert main([*speak, "-o", str(tmp_path / f"{name}.wav"), *more]) == 0
    lengths = [soundfile.info(tmp_path / f"{name}.wav").duration for name in "abc"]
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.06) and lengths[2] <= lengths[0]
    assert main([*speak, "-o", str(tmp_path / "d.wav"), "--stream", "--speed", "2"]) == 2
    assert "leave --stream out" in capsys.readouterr().err
