"""Bad input through both doors: refused before any work, in words that help, with nothing left behind."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from dia_fast import Audio, CheckpointError, Dia, InputError
from tests.helpers.front import TEXT, make_codec, make_model, refused

pytestmark = pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")

NAN, INF = math.nan, math.inf
TONE = (0.3 * np.sin(np.arange(8_000) / 20)).astype(np.float32)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `model` and a `codec`."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("bad")
    make_model(folder / "model")
    make_codec(folder / "codec")
    return folder


@pytest.fixture(scope="module")
def dia(home: Path) -> Dia:
    return Dia.from_pretrained(home / "model", codec=home / "codec", device="cpu")


def no_work(steps: int) -> None:
    pytest.fail("work was begun before the input was checked")


TEXTS: list[tuple[str, Any, str]] = [
    ("empty", "", "text is empty"),
    ("only spaces", " \n\t ", "text is empty"),
    ("only tags", "[S1] [S2]\n[S1]", "has only speaker tags ('[S1] [S2]"),
    ("10 MB", "word " * 2_000_000, "text is 10000000 bytes long, and the model reads 1024"),
    ("10 MB of wide characters", "\N{HOT BEVERAGE}" * 40_000, "text is 120000 bytes long"),
    ("10 MB of bytes", b"x" * 10_000_000, "text is 10000000 bytes long"),
    ("invalid UTF-8", b"[S1] caf\xe9 au lait", "not valid UTF-8: byte 0xe9 at offset 8"),
    ("truncated UTF-8", "[S1] é".encode()[:-1], "not valid UTF-8: byte 0xc3 at offset 5"),
    ("lone surrogate", "[S1] \ud800 there", "lone surrogate, U+D800 at position 5"),
    ("NUL byte", "[S1] a\x00b", "raw byte 0x00 at position 6, which the model reads as padding"),
    ("raw tag byte", "\x01 Hello", "raw byte 0x01 at position 0, which the model reads as [S1]; remove it, or write"),
    ("raw second tag byte", b"[S1] a\x02", "raw byte 0x02 at position 6"),
    ("number", 42, "text must be a str (or UTF-8 bytes), not int"),
    ("None", None, "text must be a str (or UTF-8 bytes), not NoneType"),
    ("empty list", [], "text is an empty list"),
    ("list with an empty text", [TEXT, ""], "text is empty"),
    ("list with a number", [TEXT, 1.5], "not float"),
    ("dict", {"text": TEXT}, "not dict"),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in TEXTS], ids=[case[0] for case in TEXTS])
def test_text(dia: Dia, tmp_path: Path, text: Any, message: str) -> None:
    with refused(InputError, message, tmp_path):
        dia.generate(text, progress=no_work)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": NAN}, "temperature must be from 0 (greedy) to 100, not nan"),
    ({"temperature": INF}, "temperature must be from 0 (greedy) to 100, not inf"),
    ({"temperature": -0.1}, "temperature must be from 0 (greedy) to 100, not -0.1"),
    ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
    ({"temperature": None}, "temperature must be a number, not None"),
    ({"temperature": 10**400}, "temperature must be from 0 (greedy) to 100, not 1000"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
    ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
    ({"top_p": NAN}, "top_p must be above 0 and at most 1, not nan"),
    ({"top_p": None}, "top_p must be a number, not None"),
    ({"top_k": 0}, "top_k must be from 1 to 2147483647, not 0; None keeps every candidate"),
    ({"top_k": -5}, "top_k must be from 1 to 2147483647, not -5"),
    ({"top_k": 2**31}, "top_k must be from 1 to 2147483647, not 2147483648"),
    ({"top_k": 45.5}, "top_k must be a whole number, not 45.5"),
    ({"guidance_scale": 0.5}, "guidance_scale must be None (no guidance) or from 1 to 100, not 0.5"),
    ({"guidance_scale": -3.0}, "guidance_scale must be None (no guidance) or from 1 to 100, not -3.0"),
    ({"guidance_scale": NAN}, "guidance_scale must be None (no guidance) or from 1 to 100, not nan"),
    ({"guidance_scale": INF}, "guidance_scale must be None (no guidance) or from 1 to 100, not inf"),
    ({"guidance_scale": True}, "guidance_scale must be a number, not True"),
    ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, not -1"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ({"max_new_tokens": 16}, "max_new_tokens must be at least 17, not 16: the delay pattern"),
    ({"max_new_tokens": 100.5}, "max_new_tokens must be a whole number, not 100.5"),
    ({"max_new_tokens": None}, "max_new_tokens must be a whole number, not None"),
    ({"do_sample": "no"}, "do_sample must be True or False, not 'no'"),
    ({"seed": -2}, "seed must be from -1 to 18446744073709551615, not -2"),
    ({"seed": 2**64}, "seed must be from -1 to 18446744073709551615, not 18446744073709551616"),
    ({"retries": -1}, "retries must be from 0 to 100, not -1"),
    ({"seed": 0.5}, "seed must be a whole number, not 0.5"),
    ({"seed": [1, 2]}, "seed has 2 entries for 1 texts"),
    ({"progress": "yes"}, "progress must be True, False or a function of the number of steps, not 'yes'"),
]


NAMES = [f"{name}={value!r:.20}" for values, _ in SETTINGS for name, value in values.items()]


@pytest.mark.parametrize(("values", "message"), SETTINGS, ids=NAMES)
def test_setting(dia: Dia, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with refused(InputError, message, tmp_path):
        dia.generate_codes(TEXT, **({"progress": no_work} | values))


def test_a_number_that_python_cannot_print(dia: Dia, tmp_path: Path) -> None:
    with refused(InputError, "seed must be from -1 to 18446744073709551615, not a number of thousands", tmp_path):
        dia.generate_codes(TEXT, seed=1 << 20_000)


def wav(samples: np.ndarray, rate: int = 44_100) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        soundfile.write(folder / "voice.wav", samples, rate, subtype="FLOAT")
        return folder / "voice.wav"

    return make


def file(data: bytes, name: str = "voice.wav") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def codes(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value)


BAD_PROMPTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing file", lambda folder: folder / "voice.wav", "voice.wav: no such file"),
    ("folder", lambda folder: folder, "is a folder"),
    ("empty file", file(b""), "voice.wav: the file is empty"),
    ("not audio", file(b"Dear Sir or Madam, " * 100), "voice.wav: not audio, or damaged"),
    ("cut-off header", file(b"RIFF\x24\x00"), "voice.wav: not audio, or damaged"),
    ("one sample", wav(TONE[:1]), "voice.wav: too short: 1 samples at 44100 Hz"),
    ("no sample", wav(TONE[:0]), "voice.wav: too short: 0 samples"),
    ("too long", wav(np.tile(TONE, 15)), "voice.wav: longer than 2.12"),
    ("NaN in the file", wav(np.where(np.arange(8_000) == 7, NAN, TONE)), "voice.wav: sample 7 is nan"),
    ("empty name", lambda _: "", "path must be a path, not ''"),
    ("name with NUL", lambda _: "voice\0.wav", "is not a path: it holds a null character"),
    ("NaN samples", lambda _: (np.full(8_000, NAN, np.float32), 44_100), "sample 0 is nan"),
    ("integer samples", lambda _: (np.zeros(8_000, np.int16), 44_100), "divide int16 by 32768"),
    ("no rate", lambda _: (TONE,), "must be (samples, sample_rate), not 1 values"),
    ("rate 0", lambda _: (TONE, 0), "sample rate 0 is not a whole number"),
    ("rate as text", lambda _: (TONE, "44100"), "sample rate '44100' is not a whole number"),
    ("channels first", lambda _: (np.zeros((2, 8_000), np.float32), 44_100), "expected shape [samples] or [samples,"),
    ("short samples", lambda _: (TONE[:10], 44_100), "audio_prompt is 0.0002 s long; 0.02 to 2.12 s can be used"),
    ("long samples", lambda _: Audio(np.tile(TONE, 15), 44_100), "audio_prompt is 2.7211 s long"),
    ("samples without a rate", lambda _: TONE, "is a torch.float32 array: codes are integers; sound needs its rate"),
    ("8 channels of codes", lambda _: codes(5, 8), "must have shape [frames, 9], not [5, 8]"),
    ("codes of a batch", lambda _: codes(1, 5, 9), "must have shape [frames, 9], not [1, 5, 9]"),
    ("no codes", lambda _: codes(0, 9), "audio_prompt has 0 frames"),
    ("too many codes", lambda _: codes(184, 9), "audio_prompt has 184 frames; 1 to 183 leave room to speak"),
    ("special code", lambda _: codes(5, 9, value=1024), "audio_prompt holds code 1024; codes go from 0 to 1023"),
    ("negative code", lambda _: codes(5, 9, value=-1), "audio_prompt holds code -1"),
    ("number", lambda _: 7, "audio_prompt must be a path, a Voice or its name, an Audio, a pair"),
    ("bytes", lambda _: b"RIFF", "audio_prompt must be a path"),
    ("list for one text", lambda _: [None], "audio_prompt is a list but there is only one text"),
]


@pytest.mark.parametrize(("make", "message"), [c[1:] for c in BAD_PROMPTS], ids=[c[0] for c in BAD_PROMPTS])
def test_prompt(dia: Dia, tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    prompt = make(tmp_path)
    with refused(InputError, message, tmp_path):
        dia.generate(TEXT, audio_prompt=prompt, progress=no_work)


GOOD_PROMPTS: list[tuple[str, Callable[[Path], Any]]] = [
    ("192 kHz", wav(TONE, 192_000)),
    ("stereo", wav(np.stack([TONE, -0.5 * TONE], axis=1))),
    ("8 kHz", wav(TONE[:4_000], 8_000)),
    ("silence", wav(0 * TONE)),
    ("far too loud", wav(100 * TONE)),
    ("one frame of codes", lambda _: codes(1, 9)),
    ("the most codes", lambda _: codes(183, 9, value=1023)),
]


@pytest.mark.parametrize("make", [case[1] for case in GOOD_PROMPTS], ids=[case[0] for case in GOOD_PROMPTS])
def test_unusual_prompts_that_work(dia: Dia, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    audio = dia.generate(TEXT, audio_prompt=make(tmp_path), seed=1, max_new_tokens=17)
    assert isinstance(audio, Audio) and np.isfinite(audio.samples).all()


def test_prompts_of_a_list_must_match(dia: Dia, tmp_path: Path) -> None:
    with refused(InputError, "audio_prompt has 1 entries for 2 texts", tmp_path):
        dia.generate([TEXT, TEXT], audio_prompt=[None], progress=no_work)


ROWS: list[tuple[str, Any, str]] = [
    ("shape", np.zeros((1, 9), np.int64), "delayed_codes must have shape [1, steps, 9], not [1, 9]"),
    ("batch", torch.zeros(2, 3, 9, dtype=torch.int64), "delayed_codes must have shape [1, steps, 9], not [2, 3, 9]"),
    ("no steps", torch.zeros(1, 0, 9, dtype=torch.int64), "delayed_codes must have 1 to 200 steps, not 0"),
    ("too many steps", torch.zeros(1, 201, 9, dtype=torch.int64), "delayed_codes must have 1 to 200 steps, not 201"),
    ("float", torch.zeros(1, 3, 9), "delayed_codes must be integers, not torch.float32"),
    ("code", torch.full((1, 3, 9), 1028), "delayed_codes hold code 1028; codes go from 0 to 1027"),
    ("negative", torch.full((1, 3, 9), -1), "delayed_codes hold code -1"),
]


@pytest.mark.parametrize(("delayed_codes", "message"), [case[1:] for case in ROWS], ids=[case[0] for case in ROWS])
def test_delayed_codes_of_forward_logits(dia: Dia, tmp_path: Path, delayed_codes: Any, message: str) -> None:
    with refused(InputError, message, tmp_path):
        dia.forward_logits(TEXT, delayed_codes)


PLACES: list[tuple[dict[str, Any], str]] = [
    ({"backend": "cudnn"}, "backend: 'cudnn' is unknown, use one of 'auto', 'torch', 'triton'"),
    ({"backend": None}, "backend: None is unknown"),
    ({"device": "gpu"}, "device 'gpu' is unknown; use 'cpu', 'cuda'"),
    ({"device": "meta"}, "device 'meta' holds no data"),
    ({"device": 3.5}, "device 3.5 is unknown"),
    ({"device": "cuda:99"}, "device 'cuda:99'"),
    ({"dtype": "int8"}, "dtype 'int8' is not supported; use float32, bfloat16 or float16"),
    ({"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    ({"dtype": 16}, "dtype 16 is not supported"),
    ({"revision": "main"}, "revision 'main' is for repositories of the Hub"),
    ({"codec": 5}, "codec must be"),
    ({"name_or_path": ""}, "name_or_path must be a Hub repository or a path, not ''"),
    ({"name_or_path": None}, "name_or_path must be a Hub repository or a path, not None"),
]


@pytest.mark.parametrize(("values", "message"), PLACES, ids=[f"{k}={v!r}" for s, _ in PLACES for k, v in s.items()])
def test_from_pretrained(home: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with refused(InputError, message, tmp_path):
        Dia.from_pretrained(**({"name_or_path": home / "model", "device": "cpu"} | values))


def test_codec_that_does_not_fit(home: Path, tmp_path: Path) -> None:
    make_codec(tmp_path / "codec", n_codebooks=4)
    dia = Dia.from_pretrained(home / "model", codec=tmp_path / "codec", device="cpu")
    with refused(CheckpointError, "4 codebooks of 1024 codes, and the model speaks 9 channels of 1024", tmp_path):
        dia.generate(TEXT, progress=no_work)
