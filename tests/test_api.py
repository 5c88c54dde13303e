"""`Dia` on a tiny random model: what goes in, what comes out, and that it comes out the same again."""

import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dia_fast
from dia_fast import Audio, CheckpointError, Dia, InputError, TextWarning
from dia_fast.audio.audio import load_audio
from dia_fast.audio.codec import load_codec
from dia_fast.generation.inputs import FRAMES_PER_SECOND
from dia_fast.generation.sampling_params import SamplingOptions, SamplingParams
from tests.helpers.front import TEXT, TINY, make_codec, make_model

pytestmark = pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")

SHORT = {"max_new_tokens": 30}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("front")
    return make_model(folder / "model"), make_codec(folder / "codec")


@pytest.fixture(scope="module")
def dia(places: tuple[Path, Path]) -> Dia:
    return Dia.from_pretrained(places[0], codec=places[1], device="cpu")


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    """A quarter of a second of two tones at 44.1 kHz."""
    time = np.arange(11_025) / 44_100
    return (0.3 * np.sin(2 * np.pi * 220 * time) + 0.1 * np.sin(2 * np.pi * 660 * time)).astype(np.float32)


def test_a_text_becomes_audio(dia: Dia) -> None:
    audio = dia.generate(TEXT, seed=3, **SHORT)
    assert isinstance(audio, Audio)
    assert audio.sample_rate == 44_100
    assert audio.seed == 3
    [codes] = dia.generate_codes(TEXT, seed=3, **SHORT)
    assert len(audio.samples) == 512 * len(codes)
    np.testing.assert_array_equal(audio.samples, dia.codec.decode(codes).numpy())


def test_codes_are_whole_frames_of_sound(dia: Dia) -> None:
    [codes] = dia.generate_codes(TEXT, seed=3, **SHORT)
    assert codes.dtype == torch.int64 and codes.device.type == "cpu"
    assert codes.shape[0] > 0 and codes.shape[1] == 9
    assert codes.min() >= 0 and codes.max() < 1024


def test_the_same_seed_speaks_the_same_and_another_does_not(dia: Dia) -> None:
    [first], [again], [other] = (dia.generate_codes(TEXT, seed=seed, **SHORT) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_seed_that_was_drawn_is_recorded(dia: Dia) -> None:
    audio = dia.generate(TEXT, **SHORT)
    assert isinstance(audio, Audio) and audio.seed is not None
    assert audio.seed != dia.generate(TEXT, **SHORT).seed
    np.testing.assert_array_equal(audio.samples, dia.generate(TEXT, seed=audio.seed, **SHORT).samples)


def test_a_list_gives_a_list_and_each_text_sounds_as_it_does_alone(dia: Dia) -> None:
    texts = [TEXT, "[S1] A shorter one.", "[S1] Three."]
    together = dia.generate(texts, seed=7, **SHORT)
    assert isinstance(together, list) and len(together) == 3
    for text, audio in zip(texts, together, strict=True):
        np.testing.assert_array_equal(audio.samples, dia.generate(text, seed=7, **SHORT).samples)
    assert isinstance(dia.generate([TEXT], seed=7, **SHORT), list)
    assert len(dia.generate_codes((TEXT, TEXT), **SHORT)) == 2


def test_each_text_may_have_its_own_seed(dia: Dia) -> None:
    takes = dia.generate([TEXT] * 3, seed=[1, 2, None], **SHORT)
    assert [take.seed for take in takes][:2] == [1, 2]
    assert takes[2].seed is not None
    np.testing.assert_array_equal(takes[1].samples, dia.generate(TEXT, seed=2, **SHORT).samples)


def test_random_seeds_differ_within_a_list(dia: Dia) -> None:
    assert len({take.seed for take in dia.generate([TEXT] * 3, **SHORT)}) == 3


def test_greedy_needs_no_seed(dia: Dia) -> None:
    [greedy] = dia.generate_codes(TEXT, do_sample=False, **SHORT)
    [cold] = dia.generate_codes(TEXT, temperature=0, seed=4, **SHORT)
    [sampled] = dia.generate_codes(TEXT, seed=4, **SHORT)
    assert torch.equal(greedy, cold)
    assert not torch.equal(greedy, sampled)


def test_every_setting_reaches_the_sampler(dia: Dia) -> None:
    [usual] = dia.generate_codes(TEXT, seed=4, **SHORT)
    for change in ({"guidance_scale": 9.0}, {"temperature": 9.0}, {"top_p": 0.05}, {"top_k": 2}, {"top_k": None}):
        [changed] = dia.generate_codes(TEXT, seed=4, **SHORT, **change)
        assert not torch.equal(usual, changed), change
    [unguided], [one] = (dia.generate_codes(TEXT, seed=4, guidance_scale=scale, **SHORT) for scale in (None, 1))
    assert torch.equal(unguided, one)
    assert not torch.equal(unguided, usual)


def test_the_shortest_run_gives_a_frame_and_a_shorter_one_is_refused(dia: Dia) -> None:
    assert len(dia.generate_codes(TEXT, seed=0, max_new_tokens=17)[0]) == 1
    with pytest.raises(InputError, match="max_new_tokens must be at least 17"):
        dia.generate_codes(TEXT, seed=0, max_new_tokens=16)


def test_a_run_ends_with_the_positions_of_the_model(dia: Dia) -> None:
    with pytest.warns(TextWarning, match="cut after 200 steps, by the model's positions"):
        [codes] = dia.generate_codes(TEXT, seed=1)
    assert len(codes) == 200 - 16
    prompt = torch.zeros(183, 9, dtype=torch.int64)
    assert len(dia.generate_codes(TEXT, audio_prompt=prompt, seed=1)[0]) == 1
    with pytest.raises(InputError, match="184 frames; 1 to 183 leave room"):
        dia.generate_codes(TEXT, audio_prompt=torch.zeros(184, 9, dtype=torch.int64))


def test_warnings_are_given_and_blame_the_caller(dia: Dia) -> None:
    with pytest.warns(TextWarning) as record:
        dia.generate_codes("No tag.", seed=0, **SHORT)
    sentences = [str(item.message) for item in record]
    assert any("begin with [S1]" in sentence for sentence in sentences)
    assert any("cut after 30 steps, by max_new_tokens" in sentence for sentence in sentences)
    assert {item.filename for item in record} == {__file__}


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_every_kind_of_prompt_is_the_same_prompt(dia: Dia, voice: np.ndarray, rate: int) -> None:
    known = Audio(voice, 44_100).resampled(rate)
    codes = dia.codec.encode(known.resampled(44_100).samples)
    [expected] = dia.generate_codes(TEXT, audio_prompt=codes, seed=2, **SHORT)
    kinds = [
        known,
        (known.samples, rate),
        (torch.from_numpy(known.samples), rate),
        (np.stack([known.samples] * 2, axis=1), rate),
        codes.numpy().astype(np.int16),
    ]
    for prompt in kinds:
        [found] = dia.generate_codes(TEXT, audio_prompt=prompt, seed=2, **SHORT)
        assert torch.equal(found, expected), type(prompt)
    assert not torch.equal(expected, dia.generate_codes(TEXT, seed=2, **SHORT)[0])


@pytest.mark.parametrize("rate", [8_000, 44_100, 192_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_prompt_may_be_a_file_of_any_rate_and_channels(
    dia: Dia, voice: np.ndarray, tmp_path: Path, rate: int, channels: int
) -> None:
    path = tmp_path / "voice.flac"
    samples = Audio(voice, 44_100).resampled(rate).samples
    soundfile.write(path, np.stack([samples] * channels, axis=1), rate)
    codes = dia.codec.encode(load_audio(path, 44_100))
    assert len(codes) == pytest.approx(0.25 * FRAMES_PER_SECOND, abs=1.5)
    [expected] = dia.generate_codes(TEXT, audio_prompt=codes, seed=2, **SHORT)
    for prompt in (path, str(path)):
        assert torch.equal(dia.generate_codes(TEXT, audio_prompt=prompt, seed=2, **SHORT)[0], expected)


def test_prompts_of_a_list(dia: Dia, voice: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Audio(voice, 44_100)
    alone = [dia.generate_codes(TEXT, audio_prompt=prompt, seed=2, **SHORT)[0] for prompt in (sound, None)]
    mixed = dia.generate_codes([TEXT, TEXT], audio_prompt=[sound, None], seed=2, **SHORT)
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))
    calls: list[int] = []
    encode = dia.codec.encode
    monkeypatch.setattr(dia.codec, "encode", lambda samples: (calls.append(1), encode(samples))[1])
    shared = dia.generate_codes([TEXT, TEXT], audio_prompt=sound, seed=2, **SHORT)
    assert torch.equal(shared[0], alone[0]) and torch.equal(shared[1], alone[0])
    assert calls == [], "the codes of a recording that was heard before are remembered"
    dia.generate_codes([TEXT, TEXT], audio_prompt=Audio(voice / 2, 44_100), seed=2, **SHORT)
    assert calls == [1], "a prompt for all texts is encoded once"


def test_progress_counts_the_steps(dia: Dia, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    dia.generate_codes(TEXT, seed=0, progress=seen.append, **SHORT)
    assert seen == list(range(1, 32))
    assert capfd.readouterr().err == ""
    dia.generate_codes(TEXT, seed=0, progress=True, **SHORT)
    output = capfd.readouterr()
    assert "x realtime" in output.err and output.out == ""


def test_without_a_codec_there_are_codes_and_nothing_else(places: tuple[Path, Path], voice: np.ndarray) -> None:
    silent = Dia.from_pretrained(str(places[0]), codec=None, device="cpu")
    assert silent.generate_codes(TEXT, seed=0, **SHORT)[0].shape[1] == 9
    with pytest.raises(InputError, match="no codec"):
        silent.generate(TEXT, seed=0, **SHORT)
    with pytest.raises(InputError, match="no codec"):
        silent.generate_codes(TEXT, audio_prompt=Audio(voice, 44_100), seed=0, **SHORT)


def test_the_codec_is_loaded_on_first_use(places: tuple[Path, Path], tmp_path: Path) -> None:
    late = Dia.from_pretrained(places[0], codec=tmp_path / "later", device="cpu")
    assert late.generate_codes(TEXT, seed=0, **SHORT)
    with pytest.raises(CheckpointError, match="later"):
        late.generate(TEXT, seed=0, progress=lambda steps: pytest.fail("generated without a codec"), **SHORT)
    make_codec(tmp_path / "later")
    late.generate(TEXT, seed=0, **SHORT)
    assert late.codec is late.codec


def test_a_loaded_codec_may_be_handed_over(places: tuple[Path, Path], dia: Dia) -> None:
    codec = load_codec(places[1])
    given_codec = Dia.from_pretrained(places[0], codec=codec, device="cpu")
    assert given_codec.codec is codec
    np.testing.assert_array_equal(
        given_codec.generate(TEXT, seed=0, **SHORT).samples, dia.generate(TEXT, seed=0, **SHORT).samples
    )


def test_forward_logits_are_what_generation_sees(dia: Dia) -> None:
    from dia_fast.model.delay import apply_delay

    [codes] = dia.generate_codes(TEXT, do_sample=False, guidance_scale=None, top_k=None, **SHORT)
    rows = apply_delay(codes, TINY.delay_pattern, 1026)[: len(codes)]
    cond, uncond = dia.forward_logits(TEXT, rows[None])
    assert uncond is not None
    assert cond.shape == uncond.shape == (1, len(codes), 9, 1028)
    assert cond.dtype == uncond.dtype == torch.float32
    assert torch.equal(cond[0, :-1, 0, :1024].argmax(-1), codes[: len(codes) - 1, 0])
    pair, nothing = dia.forward_logits([TEXT, "[S1] Hi."], rows.expand(2, -1, -1).numpy(), guidance=False)
    assert nothing is None
    torch.testing.assert_close(pair[0], cond[0])


def test_saved_and_loaded_again_it_speaks_the_same(dia: Dia, tmp_path: Path) -> None:
    folder = dia.save_pretrained(tmp_path / "copy")
    copy = Dia.from_pretrained(folder, codec=None, device="cpu")
    assert torch.equal(copy.generate_codes(TEXT, seed=9, **SHORT)[0], dia.generate_codes(TEXT, seed=9, **SHORT)[0])


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16), (None, torch.float32)]
)
def test_dtype(places: tuple[Path, Path], name: str | None, dtype: torch.dtype) -> None:
    narrow = Dia.from_pretrained(places[0], codec=None, device="cpu", dtype=name)
    assert narrow.dtype == dtype
    assert str(dtype).removeprefix("torch.") in repr(narrow)
    assert narrow.generate_codes(TEXT, seed=0, **SHORT)[0].shape[1] == 9


@settings(max_examples=25)
@given(
    text=st.text(st.sampled_from("[S1]2ab é\n"), max_size=30),
    max_new_tokens=st.integers(-2, 22),
    guidance_scale=st.none() | st.floats(),
    temperature=st.floats(),
    top_p=st.floats(),
    top_k=st.none() | st.integers(-2, 2**33),
    seed=st.integers(-1, 2**63),
)
def test_any_settings_speak_or_are_refused(dia: Dia, text: str, **values: object) -> None:
    try:
        [codes] = dia.generate_codes(text, **values)
    except InputError as error:
        assert str(error)
    else:
        assert codes.shape[1] == 9 and set(codes.flatten().tolist()) <= set(range(1024))


@given(
    guidance_scale=st.none() | st.floats(1, 100),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.none() | st.integers(1, 2**31 - 1),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=25)
def test_every_legal_setting_speaks(dia: Dia, **values: object) -> None:
    [codes] = dia.generate_codes("[S1] a", max_new_tokens=18, **values)
    assert codes.shape[1] == 9


def test_settings_take_numbers_of_any_library() -> None:
    found = SamplingParams(
        max_new_tokens=np.int32(20), temperature=np.float32(1.5), top_k=torch.tensor(7), seed=np.uint64(2**62)
    )
    values = (found.max_new_tokens, found.temperature, found.top_k, found.seed)
    assert values == (20, 1.5, 7, 2**62)
    assert all(type(value) in (int, float) for value in values)


def test_importing_costs_nothing_and_every_name_is_there() -> None:
    code = "import sys, dia_fast, dia_fast.cli; print(sorted({'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert all(getattr(dia_fast, name) for name in dia_fast.__all__)
    assert set(dia_fast.__all__) <= set(dir(dia_fast))
    assert isinstance(dia_fast.__version__, str)
    with pytest.raises(AttributeError, match="has no attribute 'Dio'"):
        dia_fast.Dio  # noqa: B018


def test_good_input_gives_no_warning(dia: Dia) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="speech was cut")
        dia.generate(TEXT, seed=0, **SHORT)


def test_sampling_params_are_accepted_whole_or_by_keyword(dia: Dia) -> None:
    assert set(SamplingOptions.__annotations__) | {"seed"} == {field.name for field in fields(SamplingParams)}
    given = {"temperature": 0.7, "top_k": 9, "max_new_tokens": 40}
    [by_keyword] = dia.generate_codes(TEXT, seed=3, **given)
    [whole] = dia.generate_codes(TEXT, sampling_params=SamplingParams(seed=3, **given))
    [mixed] = dia.generate_codes(
        TEXT, sampling_params=SamplingParams(seed=4, top_k=9), seed=3, **(given | {"top_k": 9})
    )
    assert torch.equal(by_keyword, whole) and torch.equal(by_keyword, mixed)
    assert not torch.equal(by_keyword, dia.generate_codes(TEXT, seed=3, max_new_tokens=40)[0])
    for call in (dia.generate, dia.generate_codes, dia.stream, dia.astream):
        with pytest.raises(TypeError, match="'temprature' is no setting of sampling; did you mean temperature"):
            call(TEXT, temprature=1.0)  # type: ignore[operator]
        with pytest.raises(InputError, match="sampling_params must be a SamplingParams, not"):
            call(TEXT, sampling_params={"top_k": 9})  # type: ignore[operator]
