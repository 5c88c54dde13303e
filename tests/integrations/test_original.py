"""The original package's interface: names, arguments, results, and programs that were written for it."""

import inspect
import json
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from bench.tools.codec_files import save_official
from bench.tools.tiny_models import make_original_checkpoint, tiny_config
from dia_fast.audio.codec import load_codec
from dia_fast.engine import Request, generate
from dia_fast.errors import CheckpointError, InputError
from dia_fast.integrations import original
from dia_fast.integrations.original import ComputeDtype, Dia, OriginalConfig
from dia_fast.model.config import DiaConfig
from dia_fast.model.delay import apply_delay
from dia_fast.text.tokenizer import encode_text
from tests.helpers.codecs import assert_same_sound, imported_dac
from tests.integrations import hub

TEXT = "[S1] Did you hear that? [S2] Hear what?"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def dia(cache: Path) -> Dia:
    return Dia.from_pretrained(str(cache / "model"), device=CPU, dac_model=cache / "codec")


@pytest.fixture(scope="module")
def silent(cache: Path) -> Dia:
    with pytest.warns(UserWarning, match="codes instead of sound"):
        return Dia.from_pretrained(str(cache / "model"), device=CPU, load_dac=False)


@pytest.fixture
def original_dac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from imported_dac(monkeypatch)


def prompt_codes(frames: int) -> Tensor:
    return torch.randint(0, 1024, (frames, 9))


def test_names_and_defaults() -> None:
    """Positional order and defaults, as wrappers rely on them."""
    names = {
        "generate": ["self", "text", "max_tokens", "cfg_scale", "temperature", "top_p", "use_torch_compile",
                     "cfg_filter_top_k", "audio_prompt", "audio_prompt_path", "use_cfg_filter", "verbose", "seed",
                     "pbar", "text_to_generate_size", "split", "voice", "speed"],
        "from_local": ["config_path", "checkpoint_path", "compute_dtype", "device", "load_dac", "more"],
        "from_pretrained": ["model_name", "compute_dtype", "device", "load_dac", "more"],
        "__init__": ["self", "config", "compute_dtype", "device", "load_dac", "dac_model", "dac_model_path", "quirks"],
    }  # fmt: skip
    for method, expected in names.items():
        assert list(inspect.signature(getattr(Dia, method)).parameters) == expected
    settings = inspect.signature(Dia.generate).parameters
    defaults = [
        settings[name].default for name in ("max_tokens", "cfg_scale", "temperature", "top_p", "cfg_filter_top_k")
    ]
    assert defaults == [3072, 3.0, 1.2, 0.95, 45]


def test_results(dia: Dia, silent: Dia) -> None:
    one = dia.generate(TEXT, max_tokens=60)
    assert isinstance(one, np.ndarray) and one.dtype == np.float32 and one.ndim == 1 and len(one) % 512 == 0 < len(one)
    two = dia.generate([TEXT, TEXT], max_tokens=60)
    assert isinstance(two, list) and all(item.dtype == np.float32 for item in two)
    assert isinstance(dia.generate([TEXT], max_tokens=60), np.ndarray), "a list of one text gives one array"
    codes = silent.generate(TEXT, max_tokens=60)
    assert isinstance(codes, np.ndarray) and codes.dtype == np.int64 and codes.shape[1] == 9
    assert codes.min() >= 0 and codes.max() < 1024


def test_torch_decides_about_randomness(silent: Dia) -> None:
    torch.manual_seed(3)
    first, second = silent.generate([TEXT, TEXT], max_tokens=60), silent.generate(TEXT, max_tokens=60)
    torch.manual_seed(3)
    again = silent.generate([TEXT, TEXT], max_tokens=60)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], second)
    assert np.array_equal(silent.generate(TEXT, seed=5), silent.generate([TEXT, TEXT], seed=[4, 5])[1])


@pytest.mark.parametrize("frames", [0, 7])
def test_rows_count_the_prompt(silent: Dia, frames: int) -> None:
    """`max_tokens` is the row of the grid at which an unfinished speech ends, whatever the prompt; greedy codes are the
    engine's."""
    prompt = prompt_codes(frames) if frames else None
    codes = silent.generate(TEXT, 50, 3.0, 0.0, audio_prompt=prompt)
    assert silent.model is not None
    request = Request(encode_text(TEXT), prompt, 50 - frames, 3.0, temperature=0.0)
    assert np.array_equal(codes, generate(silent.model, [request])[0].frames.numpy())
    assert len(codes) <= 50 - frames - 16


def test_quirks_free_the_last_code_of_the_longest_prompt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dia_fast.integrations.original import model

    seen: list[Request] = []
    monkeypatch.setattr(model, "generate", lambda _, requests, **__: seen.extend(requests) or generate(_, requests))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dia = Dia.from_pretrained(str(cache / "model"), device=CPU, load_dac=False, quirks=True)
    long, short = prompt_codes(9), prompt_codes(4)
    dia.generate([TEXT, TEXT, TEXT], 60, temperature=0.0, audio_prompt=[short, long, None])
    assert [request.delayed_codes is None for request in seen] == [True, False, True]
    delayed_codes = seen[1].delayed_codes
    assert delayed_codes is not None
    expected = apply_delay(long, DiaConfig().delay_pattern, 1026)
    assert (
        torch.equal(delayed_codes, expected[:-1])
        and (expected[-1, :-1] == -1).all()
        and expected[-1, -1] == long[-1, -1]
    )


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.zeros(5, 8, dtype=torch.int64), r"shape \[frames, 9\], not \[5, 8\]"),
        (torch.zeros(1, 5, 9, dtype=torch.int64), r"shape \[frames, 9\], not \[1, 5, 9\]"),
        (torch.full((5, 9), 1024), "holds code 1024"),
        (np.full((5, 9), -1), "holds code -1"),
        (torch.zeros(0, 9, dtype=torch.int64), "has 0 frames"),
        (torch.zeros(5, 9), "codes are integers"),
        (0.5, "must be a path or codes"),
    ],
)
def test_prompts_that_cannot_be(
    silent: Dia, monkeypatch: pytest.MonkeyPatch, quirks: bool, prompt: Any, message: str
) -> None:
    monkeypatch.setattr(silent, "quirks", quirks)
    with pytest.raises(InputError, match=message):
        silent.generate(TEXT, 60, audio_prompt=prompt)


@pytest.mark.parametrize("quirks", [False, True])
def test_codes_as_an_array(silent: Dia, monkeypatch: pytest.MonkeyPatch, quirks: bool) -> None:
    monkeypatch.setattr(silent, "quirks", quirks)
    codes = prompt_codes(6)
    wanted = silent.generate(TEXT, 60, audio_prompt=codes, seed=1)
    for same in (codes.numpy(), codes.int(), codes.numpy().astype(np.int16)):
        assert np.array_equal(silent.generate(TEXT, 60, audio_prompt=same, seed=1), wanted)


def test_verbose_prints_the_lines_of_the_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        endless = Dia.from_pretrained(str(hub.make_model(tmp_path, eos_gain=0.0)), device=CPU, load_dac=False)
    capsys.readouterr()
    endless.generate([TEXT, TEXT], 190, verbose=True, audio_prompt=[prompt_codes(4), prompt_codes(9)], seed=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["generate: data loaded", "generate: starting generation loop"]
    speed = r"generate step (\d+): speed=(\d+\.\d{3}) tokens/s, realtime factor=(\d+\.\d{3})x"
    told = [re.fullmatch(speed, line) for line in lines[2:-1]]
    assert [found and found[1] for found in told] == ["86", "172"]
    for found in told:
        assert found and float(found[2]) / 86 == pytest.approx(float(found[3]), abs=0.001)  # both have three digits
    assert re.fullmatch(r"generate: avg steps=\d+\.\d, total duration=\d+\.\d{3}s", lines[-1])
    endless.generate(TEXT, 60)
    assert not capsys.readouterr().out


def test_configurations_as_the_original_has_them(tmp_path: Path) -> None:
    config = OriginalConfig(tiny_config())
    assert config.model_dump() == tiny_config().to_original()
    assert json.loads(config.model_dump_json()) == config.model_dump()
    assert OriginalConfig.model_validate(config.model_dump()) == config == OriginalConfig.model_validate(config)
    config.save(tmp_path / "new" / "config.json")
    assert OriginalConfig.load(tmp_path / "new" / "config.json") == config
    assert OriginalConfig() == OriginalConfig(DiaConfig()) and len({OriginalConfig(), OriginalConfig()}) == 1
    parts = {"encoder_config": config.encoder_config, "decoder_config": config.decoder_config}
    built = OriginalConfig(**parts, delay_pattern=config.delay_pattern)
    assert built == config
    assert built.decoder_config.model_dump()["num_channels"] == built.decoder_config.num_channels == 9
    assert Dia(config.model_dump(), device=CPU).config == config
    with pytest.raises(CheckpointError, match="decoder_config"):
        OriginalConfig(decoder_config={"num_layers": 3})
    with pytest.raises(InputError, match="not both"):
        OriginalConfig(DiaConfig(), delay_pattern=[0])


def test_guidance_scales(silent: Dia) -> None:
    """1 is a scale like any other here, and 0 is none."""
    rows = {scale: silent.generate(TEXT, 60, scale, 0.0) for scale in (0, 1, 1.0, 3.0)}
    assert np.array_equal(rows[1], rows[1.0])
    assert silent.model is not None
    for scale, wanted in ((0, None), (1, 1.0000002)):
        request = Request(encode_text(TEXT), None, 60, wanted, temperature=0.0)
        assert np.array_equal(rows[scale], generate(silent.model, [request])[0].frames.numpy())


def test_sound_in_and_out(dia: Dia, tmp_path: Path) -> None:
    spoken = dia.generate(TEXT, max_tokens=60, seed=1)
    for name in ("voice.mp3", "voice.aiff"):
        dia.save_audio(str(tmp_path / name), spoken)
    assert np.abs(soundfile.read(tmp_path / "voice.aiff")[0] - np.clip(spoken, -1, 1)).max() <= 2**-15
    rate = 22_050
    soundfile.write(tmp_path / "stereo.wav", 0.1 * np.random.default_rng(0).standard_normal((rate // 4, 2)), rate)
    codes = dia.load_audio(str(tmp_path / "stereo.wav"))
    assert codes.shape == (22, 9) and not codes.is_floating_point()
    samples = dia._decode(codes)
    assert samples.shape == (22 * 512,) and samples.dtype == torch.float32
    assert torch.equal(dia._encode(samples[None]), dia._codec().encode(samples))
    by_path = dia.generate(TEXT, 80, audio_prompt=str(tmp_path / "stereo.wav"), seed=2)
    assert np.array_equal(by_path, dia.generate(TEXT, 80, audio_prompt=codes, seed=2))
    with pytest.warns(FutureWarning, match="audio_prompt_path"):
        assert np.array_equal(by_path, dia.generate(TEXT, 80, audio_prompt_path=[codes], seed=2))


@pytest.mark.parametrize("kind", ["descript", "transformers"])
def test_codecs_of_others(dia: Dia, kind: str, cache: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The caller's codec encodes and decodes; it agrees with the native codec on the same weights."""
    native = load_codec(cache / "codec")
    other: Any
    if kind == "transformers":
        from transformers import DacModel

        other = DacModel.from_pretrained(cache / "codec")
    else:
        request.getfixturevalue("original_dac")
        weights = save_official(native, tmp_path / "weights.pth", "old")
        other = load_codec(f"descript:{weights}").network.model
    mine = Dia(dia.config, device=CPU, dac_model=other.eval())
    mine.model = dia.model
    sound = 0.1 * torch.randn(1, 5000)
    codes = mine._encode(sound)
    assert torch.equal(codes, native.encode(sound[0]))
    assert_same_sound(mine._decode(codes), native.decode(codes), native)
    assert len(mine.generate(TEXT, 60)) % 512 == 0


def test_loading(tmp_path: Path, cache: Path) -> None:
    config = tiny_config()
    folder = make_original_checkpoint(tmp_path / "old", config, file="dia-v0_1.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local = Dia.from_local(str(folder / "config.json"), str(folder / "dia-v0_1.pth"), "bfloat16", CPU, False)
        whole = Dia.from_pretrained(str(folder), ComputeDtype.BFLOAT16, CPU, False)
    assert local.compute_dtype is torch.bfloat16
    assert np.array_equal(local.generate(TEXT, 40, seed=1), whole.generate(TEXT, 40, seed=1))
    assert local.config.decoder_config.num_channels == 9 and local.config.eos_token_id == 1024
    assert OriginalConfig.load(folder / "nowhere.json") is None
    for missing in (("no.json", "dia-v0_1.pth"), ("config.json", "no.pth")):
        with pytest.raises(FileNotFoundError, match="no\\."):
            Dia.from_local(*(str(folder / name) for name in missing))


def test_steps_inside_generate_are_not_offered(dia: Dia) -> None:
    with pytest.raises(AttributeError, match="engine makes all steps"):
        dia._prepare_generation(TEXT, None, False)
    assert not hasattr(dia, "_decoder_step") and not hasattr(dia, "nothing")


def test_what_cannot_be(dia: Dia, silent: Dia, tmp_path: Path) -> None:
    empty = Dia(DiaConfig().to_original(), device=CPU)
    with pytest.raises(RuntimeError, match="no weights"):
        empty.generate(TEXT)
    with pytest.raises(RuntimeError, match="no codec"):
        silent.load_audio(str(tmp_path / "x.wav"))
    with pytest.raises(RuntimeError):
        Dia.from_pretrained("nobody/nothing", device=CPU)
    for message, arguments in {
        "compute_dtype must be": {"compute_dtype": "int8"},
        "config must be": {"config": 3},
        "dac_model must be": {"dac_model": object()},
    }.items():
        with pytest.raises(InputError, match=message):
            Dia(**({"config": DiaConfig(), "device": CPU} | arguments))
    for message, arguments in {
        "audio_prompt has 1 entries for 2": {"text": [TEXT, TEXT], "audio_prompt": [None]},
        "audio_prompt has 1 entries for 3": {"text": [TEXT] * 3, "audio_prompt": prompt_codes(3)},
        "max_tokens must be more than the 30": {"max_tokens": 30, "audio_prompt": prompt_codes(30)},
        "cfg_scale must be a number": {"cfg_scale": "3"},
        "guidance_scale must be": {"cfg_scale": float("inf")},
        "top_p must be a number": {"top_p": float("nan")},
        "top_k must be": {"cfg_filter_top_k": -1},
        "temperature must be": {"temperature": -1},
        "text is an empty list": {"text": []},
        "seed has 2 entries": {"seed": [1, 2]},
        "seed must be": {"seed": "x"},
        "no such file": {"audio_prompt": str(tmp_path / "nowhere.wav")},
    }.items():
        with pytest.raises(InputError, match=message):
            dia.generate(**({"text": TEXT} | arguments))
    assert issubclass(CheckpointError, RuntimeError)


def test_install_and_uninstall() -> None:
    before = {name: sys.modules.get(name) for name in ("dia", "dia.model")}
    other = types.ModuleType("dia")
    sys.modules["dia"] = other
    try:
        original.install()
        original.install()
        from dia import Dia as top  # type: ignore[import-not-found]
        from dia.config import DiaConfig as config  # type: ignore[import-not-found]
        from dia.model import Dia as inner  # type: ignore[import-not-found]

        assert top is inner is Dia and config is OriginalConfig
        import dia.layers  # type: ignore[import-not-found]
        from dia.config import DecoderConfig  # type: ignore[import-not-found]

        assert isinstance(config().decoder_config, DecoderConfig) and not hasattr(dia.layers, "__wrapped__")
        for line in (
            "from dia.layers import Attention",
            "from dia.audio import decode",
            "from dia.config import Nothing",
        ):
            with pytest.raises(ImportError, match=r"is of the original package.*no counterpart"):
                exec(line, {})
        original.uninstall()
        original.uninstall()
        assert sys.modules["dia"] is other and "dia.model" not in sys.modules
    finally:
        original.uninstall()
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


SIMPLE = """
from dia.model import Dia

model = Dia.from_pretrained("nari-labs/Dia-1.6B-0626", compute_dtype="float16")
text = "[S1] A program. [S2] For the original package."
output = model.generate(text, use_torch_compile=False, verbose=True, cfg_scale=3.0, temperature=1.8, top_p=0.90,
                        cfg_filter_top_k=50)
model.save_audio("simple.mp3", output)
outputs = model.generate([text] * 3, use_torch_compile=True, verbose=True, max_tokens=150)
for i, item in enumerate(outputs):
    model.save_audio(f"simple_{i}.mp3", item)
clone = model.generate(text + "[S1] More. [S2] Yes.", audio_prompt="simple.mp3", use_torch_compile=False, verbose=True,
                       cfg_scale=4.0, temperature=1.8, top_p=0.90, cfg_filter_top_k=50)
model.save_audio("voice_clone.mp3", clone)
"""


def test_a_program_for_the_original_package_runs_unchanged(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SIMPLE)
    start = (
        "import runpy, torch; from dia_fast.integrations import original; torch.manual_seed(1); original.install(); "
    )
    done = hub.run(["-c", start + "runpy.run_path('program.py', run_name='__main__')"], cache, tmp_path)
    assert done.stdout.count("generate: avg steps=") == 3
    for name in ("simple", "simple_0", "simple_1", "simple_2", "voice_clone"):
        samples, rate = soundfile.read(tmp_path / f"{name}.mp3")
        assert rate == 44_100 and len(samples) > 100
