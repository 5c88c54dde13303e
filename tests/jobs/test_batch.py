"""`dia-fast batch`: every line gets its file or its reason, nothing is done twice, and nothing depends on the rest."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dia_fast import Dia, InputError
from dia_fast.audio.codec import Codec
from dia_fast.cli import main
from dia_fast.cli.batch import EPILOG
from dia_fast.engine import Engine
from dia_fast.generation.sampling_params import SamplingParams
from dia_fast.generation.voices import add_voice
from dia_fast.jobs.items import FIELDS, Defaults, Failed, Item, item_seed, read_items
from dia_fast.jobs.runner import Batch
from tests.helpers.front import make_codec, make_model, tree

TEXTS = ["[S1] One. [S2] Two.", "[S1] Three, four."]
DEFAULTS = Defaults(SamplingParams(seed=0))
Run = Callable[..., int]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("batch")
    make_model(folder / "model")
    make_codec(folder / "codec")
    soundfile.write(folder / "voice.wav", 0.3 * np.sin(np.arange(12_000) / 20), 48_000)
    return folder


@pytest.fixture
def batch(home: Path, tmp_path: Path) -> Run:
    """Run the command on some lines, into the folder `out`."""

    def run(lines: list[Any], *options: str) -> int:
        data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(data) + b"\n")
        model = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu"]
        command = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), *model, "--max-new-tokens", "30"]
        return main([*command, *options])

    return run


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "manifest.jsonl").read_text().splitlines()]


def test_each_item_sounds_as_it_does_alone(
    batch: Run, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    voice = {"prompt": str(home / "voice.wav"), "prompt_text": "[S1] Mine."}
    lines = [
        {"text": TEXTS[0]},
        {"id": "b", "text": TEXTS[1], "seed": 5, "temperature": 0.7, "top_k": None},
        {"id": "c", "text": TEXTS[1], "guidance_scale": None, **voice},
        {"id": 4, "text": TEXTS[0], "do_sample": False, "split": None, "max_new_tokens": 20},
    ]
    assert batch(lines, "--seed", "9", "--batch-size", "3") == 0
    out = capfd.readouterr()
    assert f"{tmp_path / 'out'}: 4 of 4 items done, 0 failed; " in out.out and "x realtime" in out.out
    assert "dia-fast: warning: b: speech was cut after 30 steps, by max_new_tokens" in out.err
    dia = Dia.from_pretrained(home / "model", device="cpu", codec=home / "codec")
    limit: dict[str, Any] = {"max_new_tokens": 30}
    expected = {
        "00001": dia.generate(TEXTS[0], seed=item_seed(9, "00001"), **limit),
        "b": dia.generate(TEXTS[1], seed=5, temperature=0.7, top_k=None, **limit),
        "c": dia.generate(
            "[S1] Mine. " + TEXTS[1],
            audio_prompt=home / "voice.wav",
            guidance_scale=None,
            seed=item_seed(9, "c"),
            **limit,
        ),
        "4": dia.generate(TEXTS[0], seed=item_seed(9, "4"), do_sample=False, max_new_tokens=20),
    }
    entries = manifest(tmp_path)
    assert [entry["id"] for entry in entries] == list(expected)
    for entry, (name, audio) in zip(entries, expected.items(), strict=True):
        assert (tmp_path / "out" / f"{name}.wav").read_bytes() == audio.to_bytes()
        assert (entry["status"], entry["file"], entry["segments"]) == ("done", f"{name}.wav", 1)
        assert entry["seed"] == audio.seed and entry["duration"] == pytest.approx(audio.duration, abs=1e-6)
    assert (
        entries[1]["sampling_params"]["temperature"] == 0.7
        and entries[2]["sampling_params"]["prompt_text"] == "[S1] Mine."
    )
    assert set(tree(tmp_path / "out")) == {"manifest.jsonl", *(f"{name}.wav" for name in expected)}


def test_a_voice_by_name_is_its_recording_and_its_transcript(
    batch: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of that name goes first; prompt_text in the place of the voice's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    add_voice("me", home / "voice.wav", "[S1] Hm.")
    path, new = str(home / "voice.wav"), {"text": "[S2] Two.", "seed": 4, "split": None}
    lines = [
        {"id": "named", "prompt": "me", **new},
        {"id": "told", "prompt": path, "prompt_text": "[S1] Hm.", **new},
        {"id": "other", "prompt": "me", "prompt_text": "[S1] Oh.", **new},
        {"id": "none", "prompt": "you", **new},
    ]
    assert batch(lines) == 1
    sounds = {name: (tmp_path / "out" / f"{name}.wav").read_bytes() for name in ("named", "told", "other")}
    assert sounds["named"] == sounds["told"] != sounds["other"]
    assert "'you': no such recording, and no saved voice (there are: me)" in manifest(tmp_path)[3]["error"]
    (tmp_path / "me").write_bytes((home / "voice.wav").read_bytes())
    [item] = [item for item in read_items(tmp_path / "in.jsonl", DEFAULTS) if isinstance(item, Item)][:1]
    assert (item.prompt, item.prompt_text) == (tmp_path / "me", None)


BAD: list[tuple[Any, str]] = [
    (b"{bad", "not JSON"),
    (b"\xff\xfe", "not UTF-8: byte 0xff"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "a line must be an object"),
    (b'{"text": "[S1] A.", "text": "[S1] B."}', "'text' is there twice"),
    (b'{"text": "[S1] A.", "temperature": NaN}', "temperature must be"),
    (b'{"text": "[S1] A.", "seed": 1' + b"0" * 5000 + b"}", "not JSON"),
    ({"text": "[S1] A.", "promt": "x"}, "unknown field 'promt': did you mean 'prompt'?"),
    ({"id": "x"}, "text is missing"),
    ({"text": 7}, "text must be a text, not 7"),
    ({"text": "[S1]"}, "only speaker tags"),
    ({"text": "[S1] \ud800"}, "lone surrogate"),
    ({"text": "[S1] A.", "id": "../a"}, "id must be 1 to 100 letters"),
    ({"text": "[S1] A.", "id": True}, "id must be"),
    ({"text": "[S1] A.", "id": "GOOD"}, "the id 'GOOD' is that of line 1"),
    ({"text": "[S1] A.", "seed": -2}, "seed must be"),
    ({"text": "[S1] A.", "top_p": 0}, "top_p must be"),
    ({"text": "[S1] A.", "split": "yes"}, 'split must be "auto" or null'),
    ({"text": "[S1] A.", "prompt_text": "[S1] B."}, "prompt_text needs prompt"),
    ({"text": "[S1] A.", "prompt": "none.wav"}, "'none.wav': no such recording, and no saved voice (there are: "),
    ({"text": "[S1] A.", "prompt": "\0"}, "no such recording"),
    ({"text": "[S1] A.", "prompt": "\ud800"}, "no such recording"),
    ({"text": "[S1] A.", "max_new_tokens": 3}, "max_new_tokens must be at least 17"),
    ({"text": "[S1] A.", "prompt": "in.jsonl"}, "not audio"),
]


def test_bad_lines_are_reported_and_the_others_spoken(
    batch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": "good", "text": TEXTS[0]}, *(line for line, _ in BAD), b"", {"id": "last", "text": TEXTS[1]}]
    assert batch(lines) == 1
    out = capfd.readouterr()
    assert f"2 of {len(BAD) + 2} items done, {len(BAD)} failed" in out.out
    entries = manifest(tmp_path)
    assert [entry["line"] for entry in entries] == [*range(1, len(BAD) + 2), len(BAD) + 3]
    assert [entry["status"] for entry in entries] == ["done", *["failed"] * len(BAD), "done"]
    reported = {int(line.split()[2].rstrip(":")): line for line in out.err.splitlines() if ": line " in line}
    for entry, (_, message) in zip(entries[1:-1], BAD, strict=True):
        assert message in entry["error"] and len(entry["error"]) < 400
        assert message in reported[entry["line"]]
    assert set(tree(tmp_path / "out")) == {"good.wav", "last.wav", "manifest.jsonl"}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
objects = st.fixed_dictionaries(
    {"text": st.just("[S1] Words.") | values}, optional={name: values for name in FIELDS if name != "text"}
)
raw = st.one_of(st.binary(max_size=60), objects.map(lambda fields: json.dumps(fields).encode()))


@settings(max_examples=200)
@given(st.lists(raw, max_size=5))
def test_any_line_becomes_an_item_or_a_reason(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    numbers = [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not numbers:
        with pytest.raises(InputError, match="is empty"):
            read_items(path, DEFAULTS)
        return
    items = read_items(path, DEFAULTS)
    assert [item.line for item in items] == numbers
    names = [item.id.lower() for item in items if isinstance(item, Item)]
    assert len(names) == len(set(names)), "two items would write one file"
    for item in items:
        assert len(item.error) < 500 if isinstance(item, Failed) else "/" not in item.file


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.wav")}


def test_only_what_changed_is_done_again(
    batch: Run, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    voice = tmp_path / "voice.wav"
    voice.write_bytes((home / "voice.wav").read_bytes())
    lines = [{"id": name, "text": TEXTS[0]} for name in "abc"]
    lines[2] |= {"prompt": "voice.wav", "prompt_text": "[S1] Mine."}
    assert batch(lines, "-q") == 0
    first = times(tmp_path)
    entries = manifest(tmp_path)

    def again(*options: str) -> set[str]:
        """The files that another run writes."""
        before = times(tmp_path)
        assert batch(lines, "-q", *options) == 0
        return {name for name, time in times(tmp_path).items() if before.get(name) != time}

    with monkeypatch.context() as patch:
        patch.setattr(Dia, "from_pretrained", None)  # not even loaded
        assert not again() and manifest(tmp_path) == entries
    lines[0]["seed"] = 7
    assert again() == {"a.wav"}
    lines[1]["text"] = TEXTS[1]
    assert again() == {"b.wav"}
    soundfile.write(voice, 0.3 * np.sin(np.arange(12_000) / 30), 48_000)
    assert again() == {"c.wav"}
    (tmp_path / "out" / "a.wav").write_bytes(b"RIFF")
    assert again() == {"a.wav"}
    (tmp_path / "out" / "b.wav").unlink()
    assert again() == {"b.wav"}
    lines.reverse()
    assert not again() and [entry["id"] for entry in manifest(tmp_path)] == ["c", "b", "a"]
    assert again("--temperature", "2") == {"a.wav", "b.wav", "c.wav"}
    lines[:] = lines[:1]
    assert again("--temperature", "2") == set()
    assert {entry["id"] for entry in manifest(tmp_path)} == {"a", "b", "c"}, "their files are still there"
    assert set(first) == {"a.wav", "b.wav", "c.wav"}


def test_a_torn_manifest_goes_on_and_a_damaged_one_is_refused(
    batch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"id": name, "text": TEXTS[0]} for name in "ab"]
    assert batch(lines, "-q") == 0
    whole, before = tree(tmp_path / "out"), times(tmp_path)
    path = tmp_path / "out" / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "out" / ".dia-fast-0123456789abcdef.part").write_bytes(b"half")
    monkeypatch.setattr("dia_fast.utils.files._swept", set())  # as in a new process
    assert batch(lines, "-q") == 0
    assert tree(tmp_path / "out") == whole
    assert {name for name, time in times(tmp_path).items() if before[name] != time} == {"b.wav"}
    for damage in (b"no manifest\n", b'{"status": "done"}\n', b"[]\n"):
        path.write_bytes(damage + path.read_bytes())
        capfd.readouterr()
        assert batch(lines, "-q") == 2
        assert "manifest.jsonl, line 1: not a line of a manifest; move the file away" in capfd.readouterr().err
        path.write_bytes(path.read_bytes().removeprefix(damage))


def test_ctrl_c_keeps_what_is_done(
    batch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"id": name, "text": TEXTS[0]} for name in "abcd"]
    real, count = Engine.step, 0

    def step(engine: Engine) -> bool:
        nonlocal count
        count += 1
        if count == 50:
            raise KeyboardInterrupt
        return real(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        assert batch(lines, "-q", "--batch-size", "1") == 130
    assert "the same command goes on from here\ndia-fast: interrupted\n" in capfd.readouterr().err
    done = times(tmp_path)
    assert 1 <= len(done) < 4 and len(manifest(tmp_path)) == len(done)
    assert batch(lines, "-q") == 0
    assert len(times(tmp_path)) == 4 and all(times(tmp_path)[name] == time for name, time in done.items())


def test_few_items_are_under_way_at_once(batch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, most = Engine.submit, 0

    def submit(engine: Engine, *arguments: Any, **named: Any) -> Any:
        nonlocal most
        handle = real(engine, *arguments, **named)
        stats = engine.stats
        most = max(most, stats.running + stats.waiting + stats.swapped)
        return handle

    monkeypatch.setattr(Engine, "submit", submit)
    assert batch([{"text": TEXTS[0]} for _ in range(7)], "-q", "--batch-size", "3") == 0
    assert most == 3


def test_what_fails_while_speaking_fails_alone(
    batch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = Codec.decode, 0

    def decode(codec: Codec, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("the codec broke")
        return real(codec, *arguments)

    lines = [{"id": name, "text": TEXTS[0]} for name in "abc"]
    with monkeypatch.context() as patch:
        patch.setattr(Codec, "decode", decode)
        assert batch(lines, "--batch-size", "1") == 1
    assert "dia-fast: line 2 (b): RuntimeError: the codec broke" in capfd.readouterr().err
    assert [entry["status"] for entry in manifest(tmp_path)] == ["done", "failed", "done"]
    before = times(tmp_path)
    assert batch(lines, "-q") == 0, "it is tried again"
    assert times(tmp_path).items() > before.items() and len(times(tmp_path)) == 3


def test_out_of_pages_fails_the_item_that_is_too_large(batch: Run, tmp_path: Path) -> None:
    lines = [
        {"id": "a", "text": TEXTS[0]},
        {"id": "long", "text": "[S1] " + "word " * 50},
        {"id": "b", "text": TEXTS[1]},
    ]
    assert batch(lines, "-q", "--memory", "60KB", "--batch-size", "2") == 1
    entries = manifest(tmp_path)
    assert [entry["status"] for entry in entries] == ["done", "failed", "done"]
    assert "pages" in entries[1]["error"]


def test_a_dry_run_writes_nothing(
    batch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dia, "from_pretrained", None)
    lines = [{"text": TEXTS[0]}, {"text": ""}, {"text": TEXTS[1], "prompt": "in.jsonl"}, {"text": TEXTS[1]}]
    assert batch(lines, "--dry-run") == 1
    out = capfd.readouterr()
    assert "4 to do" not in out.out and "2 that cannot be used; nothing was written" in out.out
    assert "line 2 (00002): text is empty" in out.err and "line 3 (00003): " in out.err and "not audio" in out.err
    assert not (tmp_path / "out").exists()
    assert batch(lines[:1], "--dry-run") == 0


def test_two_runs_do_not_share_a_folder(batch: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fcntl = pytest.importorskip("fcntl", reason="folders cannot be locked here")
    (tmp_path / "out").mkdir()
    holder = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert batch([{"text": TEXTS[0]}]) == 2
    os.close(holder)
    assert "another dia-fast batch is writing to" in capfd.readouterr().err
    assert not tree(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl", "out"], "cannot read none.jsonl: No such file"),
        (["empty.jsonl", "out"], "empty.jsonl is empty: write one item a line"),
        (["in.jsonl", "in.jsonl"], "cannot"),
        (["in.jsonl", "out", "--batch-size", "33"], "--batch-size must be from 1 to 32"),
        (["in.jsonl", "out", "--memory", "much"], "memory must be a number of bytes"),
        (["in.jsonl", "out", "--seed", "-2"], "seed must be"),
        (["in.jsonl", "out", "--model", ""], "--model must be a path"),
    ],
)
def test_bad_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    model = [] if "--model" in arguments else ["--model", "x"]
    assert main(["batch", *arguments, *model]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.glob("out/*.wav"))


def test_the_example_of_the_help_is_one(tmp_path: Path) -> None:
    lines = [line.split("'")[1] for line in EPILOG.splitlines() if line.strip().startswith("echo '")]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "me.wav").write_bytes(b"")
    assert all(isinstance(item, Item) for item in read_items(tmp_path / "in.jsonl", DEFAULTS)) and len(lines) == 2
    assert len(Batch(read_items(tmp_path / "in.jsonl", DEFAULTS), tmp_path / "out").pending) == 2
