"""Recordings: found, refused, encoded once, split and put into an order."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_fast.audio.code_store import default_cache
from dia_fast.audio.codec import Codec, load_codec
from dia_fast.errors import InputError
from dia_fast.text.tokenizer import TextWarning
from dia_fast.training import Dataset, Example, load_dataset, read_recordings
from dia_fast.training.data import drawn, split
from tests.helpers.front import TINY, make_codec, tree
from tests.training.corpus import RATE, make_data


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    torch.manual_seed(1)
    return load_codec(make_codec(tmp_path_factory.mktemp("codec") / "codec"))


def load(source: Path, codec: Codec, cache: Path, **options: Any) -> Dataset:
    return load_dataset(read_recordings(source), TINY, codec, cache, hidden=True, **options)


def test_a_folder_and_a_file_of_lines_are_the_same_data(codec: Codec, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data" / "deeper", 3)
    lines = [
        {"audio": f"data/deeper/{number}.wav", "text": (data / f"{number}.txt").read_text()} for number in range(3)
    ]
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    (data / "README.txt").write_text("not a transcript")
    folder = load(tmp_path / "data", codec, tmp_path / "codes")
    assert len(folder) == 3
    lined = load(tmp_path / "data.jsonl", codec, tmp_path / "codes")
    assert folder.digest == lined.digest
    for left, right in zip(folder.examples, lined.examples, strict=True):
        assert left.text == right.text and torch.equal(left.codes, right.codes)


def test_codes_are_made_once_for_the_same_sound(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = make_data(tmp_path / "data", 2), tmp_path / "codes"
    encoded: list[int] = []
    encode = Codec.encode
    monkeypatch.setattr(Codec, "encode", lambda self, samples: encoded.append(len(samples)) or encode(self, samples))
    first = load(data, codec, cache)
    samples, _ = soundfile.read(data / "0.wav", dtype="float32")
    assert len(encoded) == 2 and torch.equal(first.examples[0].codes.long(), encode(codec, samples))
    (data / "0.wav").rename(data / "2.wav")
    (data / "0.txt").rename(data / "2.txt")
    assert torch.equal(load(data, codec, cache).examples[1].codes, first.examples[0].codes)
    assert len(encoded) == 2
    soundfile.write(data / "1.wav", samples[:5000], RATE)
    assert load(data, codec, cache).digest != first.digest and len(encoded) == 3
    for path in cache.rglob("*.npy"):  # damaged: made again, not believed
        path.write_bytes(path.read_bytes()[:-7])
    load(data, codec, cache)
    assert len(encoded) == 5
    assert all(path.suffix == ".npy" for path in cache.rglob("*") if path.is_file())


def test_another_codec_has_other_codes(codec: Codec, tmp_path: Path) -> None:
    data, cache = make_data(tmp_path / "data", 1), tmp_path / "codes"
    first = load(data, codec, cache)
    other = load_codec(codec.save_pretrained(tmp_path / "codec"))
    assert load(data, other, cache).digest == first.digest, "the same codec, loaded from elsewhere"
    tensor = other.network.tensors()["decoder.conv2.weight"]
    tensor[0] += 1
    assert load(data, other, cache).digest != first.digest


def test_where_codes_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "dia-fast" / "codes"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "dia-fast" / "codes"


def spoil(data: Path, kind: str) -> None:
    """Make recording 1 of 3 unusable."""
    audio, text = data / "1.wav", data / "1.txt"
    if kind == "no transcript":
        text.unlink()
    elif kind == "empty transcript":
        text.write_text(" \n")
    elif kind == "not UTF-8":
        text.write_bytes(b"[S1] \xff")
    elif kind == "long transcript":
        text.write_text("[S1] " + "a" * 1024)
    elif kind == "not audio":
        audio.write_bytes(b"RIFF nonsense")
    elif kind == "empty audio":
        audio.write_bytes(b"")
    elif kind == "long audio":
        soundfile.write(audio, np.zeros(3 * RATE, np.float32), RATE)
    elif kind == "short audio":
        soundfile.write(audio, np.zeros(10, np.float32), RATE)


BAD = {
    "empty transcript": "1.wav: text is empty",
    "long transcript": "1.wav: the transcript has more than the 1024 bytes that the model reads",
    "not audio": r"1.wav: .*not audio, or damaged",
    "empty audio": "1.wav: .*the file is empty",
    "long audio": "1.wav: .*longer than 2.1.* s; use a shorter recording",
    "short audio": "1.wav: .*too short: 10 samples",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recording_is_named_or_left_out(kind: str, codec: Codec, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 3)
    spoil(data, kind)
    with pytest.raises(InputError, match=BAD[kind]):
        load(data, codec, tmp_path / "codes")
    with pytest.warns(TextWarning, match=f"left out: .*{BAD[kind]}"):
        assert len(load(data, codec, tmp_path / "codes", skip_bad=True)) == 2


def test_nothing_usable(codec: Codec, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 3)
    for number in range(3):
        (data / f"{number}.wav").write_bytes(b"")
    with (
        pytest.warns(TextWarning, match=r"left out: .*0.wav.*2.wav: the file is empty|left out"),
        pytest.raises(InputError, match="nothing to train on: all 3 recordings are unusable; the first is .*0.wav"),
    ):
        load(data, codec, tmp_path / "codes", skip_bad=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no transcript", r"1.wav has no transcript: write what is said in it to .*1.txt"),
        ("not UTF-8", r"1.txt: cannot be read as UTF-8 text"),
    ],
)
def test_transcripts_that_cannot_be_read(kind: str, message: str, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 3)
    spoil(data, kind)
    with pytest.raises(InputError, match=message):
        read_recordings(data)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "nothing to train on: the file is empty"),
        ("\n[1, 2\n", r"data.jsonl:2 is not JSON: .*expected \{"),
        ('{"audio": "a.wav"}', 'data.jsonl:1: no "text"'),
        ('{"text": "[S1] Hm."}', 'data.jsonl:1: no "audio"'),
        ('{"audio": "a.wav", "text": 3}', 'data.jsonl:1: no "text"'),
        ('["a.wav"]', 'data.jsonl:1: no "audio"'),
    ],
)
def test_lines_that_are_no_recordings(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        read_recordings(tmp_path / "data.jsonl")


def test_a_line_with_a_file_that_is_not_there(codec: Codec, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"audio": "a.wav", "text": "[S1] Hm."}')
    with pytest.raises(InputError, match=r"data.jsonl:1: .*a.wav: no such file"):
        load(tmp_path / "data.jsonl", codec, tmp_path / "codes")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to train on: the folder holds no .wav"):
        read_recordings(tmp_path / "empty")
    assert set(tree(tmp_path)) == {"data.jsonl", "empty"}


def test_doubtful_transcripts_are_named(codec: Codec, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 5)
    for number in range(5):
        (data / f"{number}.txt").write_text("No tag.")
    with pytest.warns(TextWarning, match="transcripts: .*0.wav: the text does not begin with .*; and 2 more"):
        load(data, codec, tmp_path / "codes")


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 60), st.integers(0, 2**40))
def test_every_epoch_draws_everything_once(count: int, first: int, length: int, seed: int) -> None:
    whole = drawn(count, 0, first + length, seed)
    assert drawn(count, first, first + length, seed) == whole[first:], "any part can be drawn by itself"
    for epoch in range((first + length) // count):
        assert Counter(whole[epoch * count : (epoch + 1) * count]) == Counter(range(count))


def test_epochs_and_seeds_differ() -> None:
    assert len({tuple(drawn(20, 20 * epoch, 20 * epoch + 20, seed)) for epoch in range(3) for seed in range(3)}) == 9


@given(st.integers(1, 30), st.floats(0, 0.99), st.integers(0, 9))
def test_the_held_out_share(count: int, share: float, seed: int) -> None:
    dataset = Dataset([Example([number + 1], torch.zeros(1, 9)) for number in range(count)], "")
    training, held_out = split(dataset, share, seed)
    assert Counter(example.text[0] for example in training.examples + held_out.examples) == Counter(range(1, count + 1))
    assert len(training) >= 1
    if share == 0 or count == 1:
        assert len(held_out) == 0
    else:
        assert len(held_out) == min(max(1, round(share * count)), count - 1)
    assert [e.text for e in split(dataset, share, seed)[1].examples] == [e.text for e in held_out.examples]
