"""Of dia-fast's own, behind the original's `generate`: long texts in segments, voices and speed."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import dia_fast
import dia_fast.audio.codec
from bench.tools.pairs import pack
from bench.tools.tiny_models import original_state, random_state, tiny_config
from dia_fast.audio.codec import load_codec
from dia_fast.audio.codec.load import OFFICIAL_CODEC
from dia_fast.audio.editing import has_media
from dia_fast.checkpoint.demo import demo_voice
from dia_fast.errors import InputError
from dia_fast.generation import voices
from dia_fast.generation.prompts import Voice
from dia_fast.integrations.original import Dia, copies
from dia_fast.model.model import DiaModel
from dia_fast.text.tokenizer import TextWarning
from dia_kernels import reference
from tests.helpers.front import make_codec
from tests.integrations.test_original_copies import EARLY

CONFIG = tiny_config({}, {"max_position_embeddings": 384})
STATE = random_state(CONFIG, 3)
TEXT = "[S1] Did you hear that? [S2] Hear what?"
LONG = " ".join(["[S1] Did you hear that? [S2] No, I did not hear a single thing."] * 2)
SAID = "[S1] This is a voice."
CODES = torch.from_numpy(np.random.default_rng(2).integers(0, 1024, (12, 9)))

pytestmark = pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")


def loaded(kind: type[Dia] = Dia, **options: Any) -> Dia:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dia = kind(CONFIG, device=torch.device("cpu"), **options)
    dia.model.load_state_dict(original_state(CONFIG, STATE))
    return dia


@pytest.fixture(scope="module")
def silent() -> Dia:
    return loaded(load_dac=False)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_codec(tmp_path_factory.mktemp("codec"))


def own_codes(text: str, **options: Any) -> np.ndarray:
    model = DiaModel(CONFIG, reference).load(pack(CONFIG, STATE))
    with dia_fast.Dia(model, None) as dia:
        return dia.generate_codes(text, temperature=1.2, top_p=0.95, top_k=45, guidance_scale=3.0, **options)[0].numpy()


@pytest.mark.parametrize("voice", [None, Voice(CODES, SAID)])
def test_segments_are_those_of_dia_fast(silent: Dia, voice: Voice | None) -> None:
    text, given = (LONG * 3, 0) if voice is None else (LONG, len(CODES))
    codes = silent.generate(text, 18 + given, split="auto", voice=voice, seed=5)
    assert np.array_equal(codes, own_codes(text, split="auto", audio_prompt=voice, seed=5, max_new_tokens=18))
    assert len(codes) > len(silent.generate(TEXT, 18 + given, voice=voice, seed=5)), "there were several segments"
    short = silent.generate(TEXT, 30, split="auto", temperature=0.0)
    assert np.array_equal(short, silent.generate(TEXT, 30, temperature=0.0)), "that fits is spoken as a whole"


def test_a_voice_is_a_prompt_with_its_words(silent: Dia) -> None:
    """One for all texts, one for each, from codes or by the original's own arguments."""
    voice = silent.voice(CODES, text=SAID)
    plain = silent.generate(f"{SAID} {TEXT}", 40, audio_prompt=CODES, temperature=0.0)
    assert np.array_equal(silent.generate(TEXT, 40, voice=voice, temperature=0.0), plain)
    other = silent.voice(CODES[:5], text="[S1] Yes.")
    each = silent.generate([TEXT, "[S1] No."], 40, voice=[voice, other], temperature=0.0)
    assert np.array_equal(each[0], plain)
    assert np.array_equal(each[1], silent.generate("[S1] No.", 40, voice=other, temperature=0.0))
    assert np.array_equal(silent.generate([TEXT, TEXT], 40, voice=voice, temperature=0.0)[1], plain)


def test_any_value_of_the_original_goes_with_them(silent: Dia) -> None:
    voice = silent.voice(CODES, text=SAID)
    for options in ({"cfg_scale": 0.5}, {"cfg_scale": -2.0}, {"cfg_scale": 0, "top_p": 0}):
        expected = silent.generate(f"{SAID} {TEXT}", 40, audio_prompt=CODES, seed=3, **options)
        assert np.array_equal(silent.generate(TEXT, 40, voice=voice, seed=3, **options), expected)


def test_saved_voices_by_name(codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    dia = loaded(dac_model=load_codec(codec))
    path = tmp_path / "me.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(44_100 // 4), 44_100)
    voices.add_voice("me", path, SAID)
    path.with_suffix(".txt").write_text(SAID)
    named = dia.generate(TEXT, 40, voice="me", temperature=0.0)
    assert named.dtype == np.float32 and len(named) > 512
    for same in (path, str(path), dia.voice("me")):
        assert np.array_equal(dia.generate(TEXT, 40, voice=same, temperature=0.0), named)
    assert np.array_equal(dia.generate(f"{SAID} {TEXT}", 40, audio_prompt=str(path), temperature=0.0), named)


@pytest.mark.skipif(not has_media(), reason="PyAV (the extra media) is not installed")
def test_speed(codec: Path) -> None:
    dia = loaded(dac_model=load_codec(codec))
    plain = dia.generate(TEXT, 60, temperature=0.0)
    assert np.array_equal(dia.generate(TEXT, 60, temperature=0.0, speed=1), plain)
    fast, slow = (dia.generate(TEXT, 60, temperature=0.0, speed=speed) for speed in (2, 0.5))
    assert len(fast) == pytest.approx(len(plain) / 2, rel=0.1) and len(slow) == pytest.approx(len(plain) * 2, rel=0.1)
    voice = dia.voice(CODES, text=SAID)
    longer = dia.generate([LONG, TEXT], 42, split="auto", voice=voice, speed=2.0, seed=5)
    assert longer[0].dtype == np.float32 and len(longer[0]) > len(longer[1])


def test_copies_take_them_too() -> None:
    node = copies.class_of(EARLY.encode())
    assert node is not None
    dia = loaded(copies.alike(node, "program.dia.model"))
    dia.load_dac = False
    voice = Voice(CODES, SAID)
    codes = dia.generate(LONG, 42, split="auto", voice=voice, seed=5, temperature=1.2, cfg_filter_top_k=45)
    assert np.array_equal(codes, own_codes(LONG, split="auto", audio_prompt=voice, seed=5, max_new_tokens=30))


def test_what_cannot_be(silent: Dia) -> None:
    voice = silent.voice(CODES, text=SAID)
    for message, options in {
        "audio_prompt and voice are two voices": {"voice": voice, "audio_prompt": CODES},
        "split must be": {"split": "always"},
        "give the recording as voice": {"split": "auto", "audio_prompt": CODES},
        "voice must be what Dia.voice makes": {"voice": CODES},
        "voice has 2 entries for 1 texts": {"voice": [voice, voice]},
        "no such recording, and no saved voice": {"voice": "nobody-of-that-name"},
        "max_tokens must be at least 29": {"voice": voice, "max_tokens": 28},
        "this Dia returns codes" if has_media() else "speed 2 needs PyAV": {"speed": 2.0},
        "speed must be from": {"speed": 9},
    }.items():
        with pytest.raises(InputError, match=message):
            silent.generate(TEXT, **{"max_tokens": 40} | options)
    with pytest.raises(InputError, match="say what is said"):
        silent.voice(CODES)


def test_progress_and_remarks(silent: Dia, capsys: pytest.CaptureFixture[str]) -> None:
    voice = silent.voice(CODES, text=SAID)
    silent.generate(LONG, 110, split="auto", voice=voice, seed=5, verbose=True)
    printed = capsys.readouterr().out
    assert "starting generation loop" in printed and "generate step 86:" in printed and "avg steps=" in printed
    with pytest.warns(TextWarning, match="segment 1 of"):
        silent.generate(LONG, 32, split="auto", voice=voice, seed=5)


@pytest.mark.parametrize("local", [True, False])
def test_a_folder_brings_its_codec(local: bool) -> None:
    """As the demo voice does, whose codec is no other's."""
    folder, cpu = demo_voice(), torch.device("cpu")
    if local:
        dia = Dia.from_local(str(folder / "config.json"), str(folder / "model.safetensors"), device=cpu)
    else:
        dia = Dia.from_pretrained(str(folder), device=cpu)
    own = load_codec(folder / "codec")
    codes = torch.arange(4)[:, None].expand(4, own.num_codebooks)
    assert torch.equal(dia.dac_model.codec.decode(codes), own.decode(codes))


def test_a_codec_of_another_rate_is_heard_at_the_original_s(tmp_path: Path) -> None:
    """The demo voice's has 16 kHz and 50 frames a second; what comes out and goes in has 44.1 kHz."""
    device = torch.device("cpu")
    text, settings = "[S1] Open the red door.", {"seed": 3, "max_tokens": 120, "temperature": 0.7}
    spoken = Dia.from_pretrained("demo", device=device)
    sound = spoken.generate(text, **settings)
    codes = Dia.from_pretrained("demo", device=device, load_dac=False).generate(text, **settings)
    assert len(sound) == pytest.approx(len(codes) / 50 * 44_100, abs=2)
    spoken.save_audio(str(tmp_path / "out.wav"), sound)
    assert soundfile.info(tmp_path / "out.wav").duration == pytest.approx(len(codes) / 50, abs=1e-3)
    assert len(spoken.load_audio(str(tmp_path / "out.wav"))) == pytest.approx(len(codes), abs=1)


def test_a_codec_that_is_named_is_taken(codec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(dia_fast.audio.codec, "load_codec", lambda name, **_: names.append(name) or load_codec(codec))
    for name in (OFFICIAL_CODEC, str(codec)):
        Dia.from_pretrained("demo", device=torch.device("cpu"), dac_model=name)
    assert names == [OFFICIAL_CODEC, str(codec)]
