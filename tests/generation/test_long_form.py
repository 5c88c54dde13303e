"""Long scripts spoken: every segment in the right voice, with its own seed, and the same as if asked for by itself."""

import math
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_fast import Dia, InputError, TextWarning
from dia_fast.audio.codec import random_codec
from dia_fast.cli import main
from dia_fast.engine import Engine, Generation
from dia_fast.generation.long_form import Script, Voice, cut, segment_seed, speak_all
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.jobs import runner
from dia_fast.jobs.items import Item
from dia_fast.model.config import DiaConfig
from dia_fast.text.segmentation import continued, join_segments, split_script
from dia_fast.text.tokenizer import encode_text, spoken_seconds
from tests.helpers.cheap_model import CheapModel
from tests.helpers.codecs import SMALL
from tests.helpers.front import TINY, make_brief_model, make_codec
from tests.helpers.virtual_device import VirtualDevice

LONG = (
    "[S1] Good evening, and welcome back. Tonight we talk about the sea, its tides, and what they carry. [S2] Thank "
    "you. It is good to be here, it really is. I have been by the sea all my life, and I am still surprised by it. "
    "(sighs) Not everybody can say that. [S1] No. [S2] Let me begin with a story, then. [S1] Do, we have got the time."
)
ROOMY = replace(TINY, decoder=replace(TINY.decoder, max_position_embeddings=900))
ROOT = Path(__file__).resolve().parents[2]
SHORT = {"max_new_tokens": 60}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("reading")
    make_brief_model(folder / "model", ROOMY)
    make_codec(folder / "codec")
    return folder


@pytest.fixture(scope="module")
def dia(home: Path) -> Dia:
    return Dia.from_pretrained(home / "model", device="cpu", codec=home / "codec", max_batch=4)


@pytest.fixture
def silence(recwarn: pytest.WarningsRecorder) -> pytest.WarningsRecorder:
    """Let warnings of the front door pass."""
    warnings.simplefilter("always", TextWarning)
    return recwarn


def decoded(dia: Dia, codes: list[Tensor]) -> np.ndarray:
    return join_segments([dia.codec.decode(frames).numpy() for frames in codes if len(frames)], 44_100)


def test_each_piece_goes_on_from_the_last(dia: Dia, silence: pytest.WarningsRecorder) -> None:
    """Against the same, done by hand with `generate_codes`."""
    audio = dia.generate(LONG, split="auto", seed=5, **SHORT)
    segments = cut(LONG, dia.config)
    assert len(segments) > 4 and max(map(spoken_seconds, segments)) <= 884 / 86.13 / 2.4
    by_hand = Script(dia.config, segments, SamplingParams(seed=5, **SHORT))
    prompts = []
    for index, segment in enumerate(segments):
        prompt, text = by_hand._in_voice(index)
        [frames] = dia.generate_codes(text, audio_prompt=prompt, seed=segment_seed(5, index), **SHORT)
        by_hand.take(index, Generation(frames, frames, 0, len(frames) == 45))
        prompts.append(prompt)
        assert text.endswith(segment.removeprefix("[S1] ").removeprefix("[S2] ")) or text.startswith("[S1]")
    assert prompts[0] is None
    assert np.array_equal(audio.samples, decoded(dia, [item for item in by_hand.frames if item is not None]))
    assert audio.seed == 5
    assert np.array_equal(dia.generate([LONG, "[S1] Short."], split="auto", seed=5, **SHORT)[0].samples, audio.samples)
    assert not np.array_equal(dia.generate(LONG, split="auto", seed=6, **SHORT).samples, audio.samples)


def test_pieces_in_a_given_voice_run_at_once(
    dia: Dia, silence: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(0, 1024, (40, 9))
    said = "[S1] My words. [S2] And mine."
    most = 0
    real = Engine.step

    def step(engine: Engine) -> bool:
        nonlocal most
        more = real(engine)
        stats = engine.stats
        most = max(most, stats.running + stats.waiting + stats.swapped)
        return more

    monkeypatch.setattr(Engine, "step", step)
    audio = dia.generate(LONG, audio_prompt=codes, prompt_text=said, split="auto", seed=5, **SHORT)
    assert most == min(4, len(cut(LONG, dia.config, Voice(codes, said)))) > 1
    segments = cut(LONG, dia.config, Voice(codes, said))
    texts = [continued(said, segment) for segment in segments]
    seeds = [segment_seed(5, index) for index in range(len(segments))]
    assert len(set(seeds)) == len(segments) > 2 and seeds[0] == 5
    assert np.array_equal(
        audio.samples, decoded(dia, dia.generate_codes(texts, audio_prompt=codes, seed=seeds, **SHORT))
    )


def test_a_text_that_fits_is_spoken_as_without(dia: Dia, silence: pytest.WarningsRecorder) -> None:
    short, codes = "[S1] Hello there. [S2] Hi.", torch.randint(0, 1024, (20, 9))
    plain = dia.generate(short, seed=2, **SHORT)
    assert np.array_equal(dia.generate(short, split="auto", seed=2, **SHORT).samples, plain.samples)
    voiced = dia.generate("[S1] Mine. " + short, audio_prompt=codes, seed=2, **SHORT)
    for split in (None, "auto"):
        again = dia.generate(short, audio_prompt=codes, prompt_text="[S1] Mine.", split=split, seed=2, **SHORT)
        assert np.array_equal(again.samples, voiced.samples)
    assert [audio.seed for audio in dia.generate([short, short], split="auto", seed=[3, 4], **SHORT)] == [3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "yes"}, 'split must be "auto" or None'),
        ({"split": "auto", "audio_prompt": torch.zeros(40, 9, dtype=torch.int64)}, "needs prompt_text"),
        ({"prompt_text": "[S1] Words."}, "prompt_text needs audio_prompt"),
        (
            {"split": "auto", "audio_prompt": torch.zeros(880, 9, dtype=torch.int64), "prompt_text": "[S1] Words."},
            "leave room for 0.0 s",
        ),
        (
            {
                "split": "auto",
                "audio_prompt": torch.zeros(9, 9, dtype=torch.int64),
                "prompt_text": "[S1] " + "a" * 1015,
            },
            "and 6 bytes: too little",
        ),
        ({"split": "auto", "seed": -2}, "seed must be"),
    ],
)
def test_what_cannot_be_split_is_refused(dia: Dia, options: dict[str, Any], message: str) -> None:
    before = dia.engine.stats.steps
    with pytest.raises(InputError, match=message):
        dia.generate(LONG, **options)
    assert dia.engine.stats.steps == before


def test_progress_counts_steps_and_the_bar_pieces(
    dia: Dia, silence: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    dia.generate(LONG, split="auto", seed=5, **SHORT, progress=seen.append)
    assert seen == sorted(seen) and seen[0] == 1 and len(seen) > 30
    dia.generate(LONG, split="auto", seed=5, **SHORT, progress=True)
    shown = capfd.readouterr().err
    assert f"0/{len(cut(LONG, dia.config))} segments" in shown and "x realtime" in shown


def test_an_interruption_leaves_the_engine_free(dia: Dia, silence: pytest.WarningsRecorder) -> None:
    def interrupt(steps: int) -> None:
        if steps == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dia.generate([LONG, LONG], split="auto", seed=5, **SHORT, progress=interrupt)
    dia.engine.step()
    stats = dia.engine.stats
    assert (stats.running, stats.waiting, stats.pages) == (0, 0, 0)


def script_of(segments: list[str]) -> Script:
    return Script(DiaConfig(), segments, SamplingParams(seed=1, retries=0))


def tell(script: Script, frames: int, *, truncated: bool = False) -> tuple[Tensor | None, bytes]:
    """The next segment's prompt and text; it is then spoken with so many frames, all of them its index."""
    asked = script.next_request()
    assert asked is not None
    index, request = asked
    codes = torch.full((frames, 9), index, dtype=torch.int64)
    script.take(index, Generation(codes, codes, 0, truncated))
    return request.prompt, bytes(request.text_ids)


def parts(prompt: Tensor | None) -> list[int]:
    """The segments that a prompt consists of."""
    return [] if prompt is None else prompt[:, 0].unique_consecutive().tolist()


def test_the_voice_is_that_of_the_last_piece_with_all_speakers() -> None:
    script = script_of(["[S1] A. [S2] B.", "[S1] C.", "[S1] D.", "[S2] E.", "[S1] F. [S2] G.", "[S2] H."])
    found = [tell(script, 100) for _ in range(6)]
    assert script.done and script.next_request() is None
    # D follows C; E needs the second speaker, whom only A and B have; F and G need both: B has them, so does C with D.
    assert [parts(prompt) for prompt, _ in found] == [[], [0], [1], [0], [0], [4]]
    assert found[2][1] == b"\x01 C. D." and found[3][1] == b"\x01 A. \x02 B. E."


def test_two_pieces_make_a_voice_if_no_one_piece_has_both() -> None:
    script = script_of(["[S1] A.", "[S2] B.", "[S1] C. [S2] D."])
    found = [tell(script, 100) for _ in range(3)]
    assert parts(found[2][0]) == [0, 1] and found[2][1] == b"\x01 A. \x02 B. \x01 C. \x02 D."


def test_only_whole_pieces_that_leave_room_are_a_voice() -> None:
    script = script_of(["[S1] A.", "[S1] B.", "[S1] C.", "[S1] D.", "[S1] E."])
    assert parts(tell(script, 500)[0]) == []
    assert parts(tell(script, 500, truncated=True)[0]) == [0]
    assert parts(tell(script, 0)[0]) == [0], "text and sound of a segment that was cut do not match"
    assert parts(tell(script, 3050)[0]) == [0], "nothing was said"
    assert parts(tell(script, 500)[0]) == [], "so long a prompt leaves no room"
    told = " ".join(script.remarks)
    assert "segment 2 of 5: speech was cut" in told and "segment 3 of 5: the model ended the speech" in told
    assert "segment 5 of 5 begins with a new voice" in told


def test_a_prompt_and_its_words_leave_room_for_the_piece() -> None:
    segments = ["[S1] " + "é" * 300, "[S1] " + "é" * 300, "[S1] b"]
    script = script_of(segments)
    assert [parts(tell(script, 100)[0]) for _ in range(3)] == [[], [], [1]], "1200 bytes are too many"


def test_pieces_with_a_voice_are_all_ready() -> None:
    voice = Voice(torch.zeros(100, 9, dtype=torch.int64), "[S1] Mine.")
    script = Script(DiaConfig(), ["[S1] A.", "[S2] B.", "[S1] C."], SamplingParams(seed=1), voice)
    texts = [bytes(asked[1].text_ids) for _ in range(3) if (asked := script.next_request())]
    assert texts == [b"\x01 Mine. A.", b"\x01 Mine. \x02 B.", b"\x01 Mine. C."]
    assert any("[S2] is not heard in the audio prompt" in remark for remark in script.remarks)


def test_limits_follow_the_model_and_the_voice() -> None:
    config, text = DiaConfig(), "[S1] " + "some words, " * 200
    assert cut("[S1] " + "a" * 299, config) == ["[S1] " + "a" * 299], "20 s are fine"
    assert len(cut("[S1] " + "a " * 151, config)) == 2
    assert max(map(spoken_seconds, cut(text, config))) <= 12
    long_voice = Voice(torch.zeros(2500, 9, dtype=torch.int64), "[S1] x")
    assert max(map(spoken_seconds, cut(text, config, long_voice))) <= (3072 - 17 - 2500) / 86.13 / 1.2
    wordy = Voice(torch.zeros(100, 9, dtype=torch.int64), "[S1] " + "x" * 900)
    segments = cut(text, config, wordy)
    assert all(len(encode_text(continued(wordy.text, segment), max_length=9999)) <= 1024 for segment in segments)
    assert cut(text, config) == split_script(text, max_seconds=12, max_bytes=511)


def test_what_fails_ends_its_reading_alone(dia: Dia, silence: pytest.WarningsRecorder) -> None:
    many = [
        Script(dia.config, cut(LONG, dia.config), SamplingParams(seed=seed, **SHORT), name=str(seed))
        for seed in range(4)
    ]
    bad = Script(dia.config, ["[S1] A.", "[S1] B."], SamplingParams(seed=1, **SHORT), name="bad")
    bad.take = fail  # type: ignore[method-assign]
    begun = []

    def source() -> Any:
        for item in [many[0], bad, *many[1:]]:
            begun.append(item)
            yield item

    ended = []
    for item in speak_all(dia.engine, source(), 2):
        ended.append(item.name)
        unfinished = [other for other in begun if not other.done]
        assert len(unfinished) <= 2, "scripts are taken up one by one"
    assert sorted(ended) == ["0", "1", "2", "3", "bad"] and isinstance(bad.error, ZeroDivisionError)
    assert all(item.error is None for item in many)
    solo = Script(dia.config, cut(LONG, dia.config), SamplingParams(seed=3, **SHORT))
    assert list(speak_all(dia.engine, [solo], 1)) == [solo]
    assert all(torch.equal(first, second) for first, second in zip(solo.frames, many[3].frames, strict=True))
    assert not list(speak_all(dia.engine, [], 3))


@pytest.mark.parametrize("door", ["generate", "batch"])
@pytest.mark.filterwarnings("ignore::dia_fast.text.tokenizer.TextWarning")
def test_the_codec_decodes_while_others_are_generated(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decode waits until a step has been made since it began, which nobody makes if it is waited for itself."""
    model: Any = CheapModel(ends=False)
    dia = Dia(model, random_codec(replace(SMALL, codebook_size=64)))
    engine = dia._engine = Engine(model, max_batch=3, device=VirtualDevice(1e-3))
    overlapped, threads = list[bool](), set[int]()

    def decode(codes: Tensor) -> Tensor:
        before, end = engine.steps, time.monotonic() + 2
        threads.add(threading.get_ident())
        while engine.steps == before and engine.stats.running and time.monotonic() < end:
            time.sleep(1e-3)
        overlapped.append(engine.steps > before)
        return codes.sum(1).float()

    monkeypatch.setattr(dia.codec, "decode", decode)
    count, text, sounds = 7, "[S1] Yes.", dict[int, np.ndarray]()
    if door == "generate":
        prompts = [torch.zeros(70 + 10 * (index % 3), 3, dtype=torch.int64) for index in range(count)]
        alone: list[dict[str, Any]] = [{"audio_prompt": prompt} for prompt in prompts]
        audios = dia.generate([text] * count, seed=list(range(count)), audio_prompt=prompts)
        sounds = {index: audio.samples for index, audio in enumerate(audios)}
    else:
        alone = [{"max_new_tokens": 20 + 10 * (index % 3)} for index in range(count)]
        params = [dia.defaults.given(seed=index, **alone[index]) for index in range(count)]
        items = [Item(0, str(seed), text, None, None, "", False, params[seed], "", {}, "") for seed in range(count)]
        sounds = {int(spoken.id): spoken.samples for spoken in runner.speak_items(dia, items)}
    assert len(overlapped) == count and sum(overlapped) >= 2
    assert len(threads) == 1 and threading.get_ident() not in threads
    for seed in range(count):
        [codes] = dia.generate_codes(text, seed=seed, **alone[seed])
        assert len(codes) and np.array_equal(sounds[seed], codes.sum(1).float().numpy())


def test_as_many_may_wait_for_the_codec_as_are_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still; whoever speaks takes up a few more scripts, and then waits for it."""
    model: Any = CheapModel(ends=False)
    dia = Dia(model, random_codec(replace(SMALL, codebook_size=64)))
    go, taken, real = threading.Event(), list[int](), dia.codec.decode
    monkeypatch.setattr(dia.codec, "decode", lambda codes: (go.wait(20), real(codes))[1])

    def source() -> Iterator[Script]:
        for seed in range(20):
            taken.append(seed)
            yield Script(dia.config, ["[S1] Yes."], SamplingParams(seed=seed, max_new_tokens=9))

    threading.Timer(0.5, go.set).start()
    spoken = speak_all(dia.engine, source(), 2, codec=dia.codec)
    first = next(spoken)
    assert len(taken) == 4 and first.error is None
    assert len(list(spoken)) == 19


HOUR = """
import sys, torch
from bench.metrics import forget_peak, resident
from dia_fast.audio.codec import CodecConfig, random_codec
from dia_fast.generation.long_form import Script
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.model.config import DiaConfig
segments = int(sys.argv[1])
codec = random_codec(CodecConfig(encoder_hidden_size=4, downsampling_ratios=(2, 4), decoder_hidden_size=16))
codec.decode = lambda frames: torch.full((len(frames) * 512,), 0.5)
script = Script(DiaConfig(), ["[S1] Yes."] * segments, SamplingParams(seed=0))
script.frames = [torch.zeros(775, 9, dtype=torch.int64)] * segments  # 9 s
Script.outcome = None
forget_peak()
before = resident("VmRSS")
audio = script.audio(codec)
assert len(audio.samples) == segments * 775 * 512
print((resident("VmHWM") - before) / audio.samples.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the largest size of a process is read as Linux tells it")
@pytest.mark.parametrize("segments", [67, pytest.param(400, marks=pytest.mark.slow)])
def test_a_long_script_holds_each_sample_once(segments: int) -> None:
    """Ten minutes, and an hour. Memory grows by an eighth at a time, and a segment comes before it is joined."""
    command = [sys.executable, "-c", HOUR, str(segments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert 1 <= float(done.stdout) < 1.25


def fail(index: int, spoken: Generation) -> None:
    raise ZeroDivisionError("a bug")


def test_speak_splits_a_file(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], dia: Dia) -> None:
    (tmp_path / "script.txt").write_text(LONG)
    command = [
        "speak",
        "--model",
        str(home / "model"),
        "--codec",
        str(home / "codec"),
        "--device",
        "cpu",
        "--seed",
        "5",
    ]
    command += ["--max-new-tokens", "60", "--file", str(tmp_path / "script.txt"), "-o"]
    outcome = dia.generate(LONG, split="auto", seed=5, **SHORT).outcome
    assert outcome is not None and outcome.status == "partial"
    assert main([*command, str(tmp_path / "split.wav")]) == 1, "some segments are silent"
    assert "split it" not in capfd.readouterr().err
    assert main([*command, str(tmp_path / "whole.wav"), "--split", "none"]) == 0
    assert "split it" in capfd.readouterr().err
    split, whole = (tmp_path / name for name in ("split.wav", "whole.wav"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert split.read_bytes() == dia.generate(LONG, split="auto", seed=5, **SHORT).to_bytes()
        assert whole.read_bytes() == dia.generate(LONG, seed=5, **SHORT).to_bytes()


def test_expected_steps_are_near() -> None:
    script = script_of(["[S1] " + "a" * 149, "[S2] " + "b" * 149])
    assert script.expected_steps() == 2 * (math.ceil(10 * 44_100 / 512) + 17)
