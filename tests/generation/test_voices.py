"""Voices as values: encoded once, kept in memory and on disk, and known by name at every door."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from dia_fast import Audio, Dia, InputError
from dia_fast.cli import main
from dia_fast.generation.voices import add_voice, saved_voices, voices_folder
from tests.helpers.front import make_dia

pytestmark = pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")

SAID, NEW = "[S1] These are my words.", "And this is new."
SHORT: dict[str, Any] = {"max_new_tokens": 30, "seed": 3}


@pytest.fixture
def dia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dia:
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return make_dia(tmp_path / "dia")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "me.wav"
    time = np.arange(11_025) / 44_100
    soundfile.write(path, (0.3 * np.sin(2 * np.pi * 220 * time)).astype(np.float32), 44_100)
    path.with_suffix(".txt").write_text(SAID + "\n")
    return path


def counted(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what the codec encodes from now on."""
    seen: list[int] = []
    real = dia.codec.encode
    monkeypatch.setattr(dia.codec, "encode", lambda samples: (seen.append(len(samples)), real(samples))[1])
    return seen


def test_a_voice_is_encoded_once_and_speaks_as_its_recording(
    dia: Dia, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [expected] = dia.generate_codes(NEW, audio_prompt=str(recording), prompt_text=SAID, **SHORT)
    seen = counted(dia, monkeypatch)
    voice = dia.voice(recording)
    assert (voice.text, len(seen)) == (SAID, 1)
    assert torch.equal(voice.codes, dia.voice(str(recording), text=SAID).codes)
    assert torch.equal(dia.generate_codes(NEW, audio_prompt=voice, **SHORT)[0], expected)
    assert torch.equal(dia.generate_codes([NEW, NEW], audio_prompt=[voice, None], **SHORT)[0], expected)
    assert len(seen) == 1, "the memory holds them"
    with Dia(dia.model, dia.codec) as another:
        assert torch.equal(another.voice(recording).codes, voice.codes)
    assert len(seen) == 1, "the disk holds them"
    soundfile.write(recording, np.zeros(9_000, np.float32), 44_100)
    assert not torch.equal(dia.voice(recording).codes, voice.codes) and len(seen) == 2


def test_a_second_call_in_a_voice_computes_half_of_its_prompt(
    dia: Dia, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voice, seen, rows = dia.voice(recording), counted(dia, monkeypatch), list[int]()
    real = dia.model.prefill

    def prefill(codes: torch.Tensor, *inputs: Any, **named: Any) -> None:
        rows.append(len(codes))
        real(codes, *inputs, **named)

    monkeypatch.setattr(dia.model, "prefill", prefill)
    calls = [(voice, 2), (voice, 1), (str(recording), 1), (torch.flip(voice.codes, [0]), 2), (voice, 1)]
    for prompt, halves in calls:
        said = {} if prompt is voice else {"prompt_text": SAID}
        codes = dia.generate_codes([NEW, "Something else."], audio_prompt=prompt, **said, **SHORT)
        assert sum(rows) == len(voice.codes) * (halves + 1)  # the second text has the first one's prompt
        rows.clear()
        with Dia(dia.model, dia.codec) as fresh:
            for text, ours in zip((NEW, "Something else."), codes, strict=True):
                assert torch.equal(fresh.generate_codes(text, audio_prompt=prompt, **said, **SHORT)[0], ours)
                fresh.close()
        rows.clear()
    assert len(seen) <= 3  # of the path: once here, and once in each fresh one


def test_a_damaged_transcript_harms_its_own_voice_alone(dia: Dia, recording: Path) -> None:
    add_voice("Good", recording, SAID)
    add_voice("Bad", recording, SAID).path.with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    assert dia.voice("Good").text == SAID
    with pytest.raises(InputError, match=r"Bad\.txt"):
        dia.voice("Bad")


def test_every_door_knows_a_saved_voice_by_its_name(dia: Dia, recording: Path) -> None:
    add_voice("Mine-1", recording, SAID)
    assert [voice.name for voice in saved_voices()] == ["Mine-1"]
    voice = dia.voice("Mine-1")
    expected = dia.generate(NEW, audio_prompt=voice, **SHORT)
    found = dia.generate(NEW, audio_prompt="Mine-1", **SHORT)
    np.testing.assert_array_equal(found.samples, expected.samples)
    streamed = np.concatenate([chunk.samples for chunk in dia.stream(NEW, audio_prompt="Mine-1", **SHORT)])
    np.testing.assert_allclose(streamed, expected.samples, rtol=0, atol=2e-6)
    other = dia.generate_codes(NEW, audio_prompt="Mine-1", prompt_text="[S1] Other words.", **SHORT)[0]
    assert not torch.equal(other, dia.generate_codes(NEW, audio_prompt="Mine-1", **SHORT)[0])


def test_a_folder_and_samples_are_voices_too(dia: Dia, recording: Path, tmp_path: Path) -> None:
    folder = tmp_path / "voice"
    add_voice("only", recording, SAID, folder)
    assert torch.equal(dia.voice(folder).codes, dia.voice(recording).codes)
    samples, rate = soundfile.read(recording, dtype="float32")
    for sound in (Audio(samples, rate), (samples, rate)):
        voice = dia.voice(sound, text=SAID)
        assert torch.equal(voice.codes, dia.voice(recording).codes) and voice.text == SAID


def test_what_is_no_voice(dia: Dia, recording: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recording, and no saved voice"):
        dia.voice("nobody")
    with pytest.raises(InputError, match="holds one recording, not 0"):
        dia.voice(tmp_path / "dia")
    with pytest.raises(InputError, match="text: say what is said"):
        dia.voice(Audio(np.zeros(9_000, np.float32), 44_100))
    recording.with_suffix(".txt").unlink()
    with pytest.raises(InputError, match="give text, or write what is said"):
        dia.voice(recording)
    for name in ("", "a b", "../x", "x" * 65):
        with pytest.raises(InputError, match="a voice's name is"):
            add_voice(name, recording, SAID)
    add_voice("me", recording, SAID)
    with pytest.raises(InputError, match="there is a voice me already"):
        add_voice("me", recording, SAID)


def test_the_command_lists_adds_and_shows(dia: Dia, recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["voices", "add", "me", str(recording)]) == 0
    assert str(voices_folder() / "me.wav") in capsys.readouterr().out
    assert main(["voices", "list"]) == 0
    assert capsys.readouterr().out.split()[:4] == ["me", "0.2", "s", "[S1]"]
    assert main(["voices", "show", "me"]) == 0
    assert SAID in capsys.readouterr().out
    for wrong in (["list", "me"], ["add", "me"], ["show"], ["show", "you"], ["list", "--text", "x"]):
        assert main(["voices", *wrong]) == 2
        assert "dia-fast: error: " in capsys.readouterr().err
