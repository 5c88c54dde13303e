"""Lost speech is told at every door, after it was tried again with seeds that can be known beforehand."""

import asyncio
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dia_fast import Dia, Outcome, TextWarning
from dia_fast.cli import main
from dia_fast.engine import batch_rows
from dia_fast.generation.long_form import Script, cut, segment_seed
from dia_fast.generation.outcome import Segment, attempt_seed, silence
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.model.config import DiaConfig
from tests.helpers.front import TINY, make_codec, make_model

TEXT = "[S1] One of the words. [S2] Two of the words. [S1] Three of the words. [S2] Four of the words in all."
LONG = " ".join(f"[S{number % 2 + 1}] {'Some words that are said. ' * 5}" for number in range(4))
ROOMY = replace(TINY, decoder=replace(TINY.decoder, max_position_embeddings=900))
SHORT: dict[str, Any] = {"max_new_tokens": 30}
Silent = Callable[..., None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("outcome")
    make_model(folder / "model", ROOMY)
    make_codec(folder / "codec")
    return folder


@pytest.fixture(scope="module")
def dia(home: Path) -> Dia:
    return Dia.from_pretrained(home / "model", device="cpu", codec=home / "codec", max_batch=3)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Silent:
    """Make the requests with some seeds end before their first frame; without seeds, all requests."""
    real = batch_rows.collect

    def patch(*seeds: int) -> None:
        def collect(*args: Any) -> Any:
            found = real(*args)
            lost = not seeds or found.seed in seeds
            return replace(found, frames=found.frames[:0], truncated=False) if lost else found

        monkeypatch.setattr(batch_rows, "collect", collect)

    return patch


@pytest.fixture(autouse=True)
def told() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        yield


def test_silence_is_tried_again_with_seeds_that_do_not_depend_on_the_batch(dia: Dia, silent: Silent) -> None:
    second = dia.generate(TEXT, seed=attempt_seed(5, 1), **SHORT)
    silent(5)
    alone = dia.generate(TEXT, seed=5, **SHORT)
    together = dia.generate([TEXT, TEXT, TEXT, TEXT], seed=[8, 5, 7, 5], **SHORT)
    for audio in (alone, together[1], together[3]):
        assert np.array_equal(audio.samples, second.samples) and audio.seed == 5
        assert audio.outcome is not None and audio.outcome.status == "done"
        assert audio.outcome.segments == (Segment(TEXT, "length", 14, (5, attempt_seed(5, 1))),)
    [codes] = dia.generate_codes(TEXT, seed=5, **SHORT)
    assert torch.equal(codes, dia.generate_codes(TEXT, seed=attempt_seed(5, 1), **SHORT)[0])


def test_every_door_of_python_tells_of_silence(dia: Dia, silent: Silent) -> None:
    silent()
    seeds = tuple(attempt_seed(5, number) for number in range(3))
    expected = Outcome(
        (Segment(TEXT, "silent", 0, seeds),),
        (silence(3),),
    )
    assert expected.status == "failed" and expected.finish_reason == "silent" and len(set(seeds)) == 3
    with pytest.warns(TextWarning, match="before it began") as record:
        assert dia.generate(TEXT, seed=5, **SHORT).outcome == expected
    assert record[0].filename == __file__
    chunks = dia.stream(TEXT, seed=5, **SHORT)
    assert chunks.outcome is None
    with pytest.warns(TextWarning, match="before it began") as record:
        assert list(chunks) == [] and chunks.outcome == expected
    assert record[0].filename == __file__

    async def listen() -> Outcome | None:
        stream = dia.astream(TEXT, seed=5, **SHORT)
        assert [chunk async for chunk in stream] == []
        return stream.outcome

    with pytest.warns(TextWarning, match="before it began"):
        assert asyncio.run(listen()) == expected


@pytest.mark.parametrize(("options", "count"), [({"retries": 0}, 1), ({"retries": 4}, 5), ({"do_sample": False}, 1)])
def test_as_many_attempts_as_asked_and_one_where_seeds_change_nothing(
    dia: Dia, silent: Silent, options: dict[str, Any], count: int
) -> None:
    silent()
    found = dia.generate(TEXT, seed=5, **SHORT, **options).outcome
    assert found is not None and len(found.segments[0].seeds) == count
    chunks = dia.stream(TEXT, seed=5, **SHORT, **options)
    assert list(chunks) == [] and chunks.outcome == found


def test_a_stream_begins_anew(dia: Dia, silent: Silent) -> None:
    second = dia.generate(TEXT, seed=attempt_seed(5, 1), **SHORT)
    silent(5)
    chunks = dia.stream(TEXT, seed=5, **SHORT)
    assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), second.samples)
    assert chunks.outcome is not None and chunks.outcome.finish_reason == "length"
    assert chunks.outcome.segments[0].seeds == (5, attempt_seed(5, 1))


def test_the_outcome_names_the_segments(dia: Dia, silent: Silent) -> None:
    lost = segment_seed(5, 1)
    silent(*(attempt_seed(lost, number) for number in range(3)))
    found = dia.generate(LONG, seed=5, split="auto", **SHORT).outcome
    assert found is not None and found.status == "partial" and found.silent == (1,)
    assert len(found.segments) > 2 and found.segments[1].frames == 0 and found.segments[2].frames == 14
    assert any("segment 2 of" in remark and "before it began" in remark for remark in found.warnings)


def test_speak_fails_but_keeps_what_there_is(
    home: Path, tmp_path: Path, silent: Silent, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["speak", LONG, "--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu"]
    command += ["--seed", "5", "--max-new-tokens", "30", "-o"]
    silent(*(attempt_seed(segment_seed(5, 1), number) for number in range(3)))
    assert main([*command, str(tmp_path / "partial.wav")]) == 1
    assert "error: partial: of" in capfd.readouterr().err
    silent()
    for number, more in enumerate(([], ["--stream"])):
        assert main([*command, str(tmp_path / f"none{number}.wav"), *more]) == 1
        assert "error: the model ended the speech before it began" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["partial.wav"]


def test_a_batch_does_partial_items_again(home: Path, tmp_path: Path, silent: Silent, monkeypatch: Any) -> None:
    lines = [{"id": "a", "text": LONG, "seed": 5}, {"id": "b", "text": TEXT, "seed": 6}, {"id": "c", "text": TEXT}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--model", str(home / "model")]
    command += ["--codec", str(home / "codec"), "--device", "cpu", "--max-new-tokens", "30"]

    def entries() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]

    lost = [attempt_seed(seed, number) for seed in (segment_seed(5, 1), 6) for number in range(3)]
    with monkeypatch.context():
        silent(*lost)
        assert main(command) == 1
    first = entries()
    assert [entry["status"] for entry in first] == ["partial", "failed", "done"]
    assert first[0]["outcome"]["segments"][1] == {
        "text": first[0]["outcome"]["segments"][1]["text"],
        "finish_reason": "silent",
        "frames": 0,
        "seeds": lost[:3],
    }
    assert first[1]["outcome"]["segments"][0]["seeds"] == lost[3:]
    silent(-7)  # nothing
    assert main(command) == 0
    again = entries()
    assert [entry["status"] for entry in again] == ["done"] * 3 and again[2] == first[2]
    assert (tmp_path / "out" / "a.wav").stat().st_size == again[0]["bytes"] > first[0]["bytes"]


def test_seeds_of_64_bits_are_taken_and_minus_one_draws(dia: Dia) -> None:
    high = dia.generate(TEXT, seed=2**64 - 1, **SHORT)
    assert high.seed == 2**64 - 1
    assert np.array_equal(high.samples, dia.generate([TEXT, TEXT], seed=[3, 2**64 - 1], **SHORT)[1].samples)
    assert not np.array_equal(high.samples, dia.generate(TEXT, seed=2**63 - 1, **SHORT).samples)
    drawn = dia.generate([TEXT, TEXT], seed=[-1, -1], **SHORT)
    assert drawn[0].seed is not None and drawn[0].seed >= 0 and drawn[0].seed != drawn[1].seed
    assert np.array_equal(dia.generate(TEXT, seed=drawn[0].seed, **SHORT).samples, drawn[0].samples)


def test_counts_and_arrays_as_numpy_gives_them(dia: Dia, home: Path) -> None:
    expected = dia.generate_codes(TEXT, seed=5, **SHORT)[0]
    assert torch.equal(expected, dia.generate_codes(TEXT, seed=np.uint64(5), max_new_tokens=30.0)[0])
    assert torch.equal(expected, dia.generate_codes(TEXT, seed=5.0, max_new_tokens=np.int64(30))[0])
    loaded = Dia.from_pretrained(
        home / "model", device="cpu", codec=None, max_batch=np.int64(2), memory=np.int64(10**8)
    )
    assert torch.equal(expected, loaded.generate_codes(TEXT, seed=5, **SHORT)[0])
    codes, sound = np.ones((20, 9), np.int64), np.sin(np.arange(9_000, dtype=np.float32) / 20)
    for array, prompt in ((codes, codes), (sound, (sound, 44_100.0))):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", TextWarning)
            writable = dia.generate_codes(TEXT, audio_prompt=prompt, seed=5, **SHORT)[0]
            array.flags.writeable = False
            assert torch.equal(writable, dia.generate_codes(TEXT, audio_prompt=prompt, seed=5, **SHORT)[0])


def test_frames_per_second_are_those_of_the_codec() -> None:
    text = "[S1] " + "a " * 140
    slow, fast = (cut(text, ROOMY, None, rate) for rate in (20.0, 86.0))
    assert len(slow) == 1 and len(cut(text * 2, ROOMY, None, 20.0)) < len(cut(text * 2, ROOMY, None, 86.0))
    assert Script(ROOMY, fast, SamplingParams(seed=1), None, "", 20.0).expected_steps() < 20 * 20 + 17 * len(fast) + 2


def test_short_texts_are_warned_of_where_the_advice_holds(dia: Dia) -> None:
    assert any("below 5 s" in remark for remark in Script(DiaConfig(), ["[S1] Hello."], SamplingParams(seed=1)).remarks)
    assert not Script(ROOMY, ["[S1] Hello."], SamplingParams(seed=1)).remarks, "of shorter texts, like the demo voice"
