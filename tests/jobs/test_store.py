"""A batch from and to URLs: what arrives there is what a folder of this machine would hold."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
import torch

from dia_fast.cli import main
from dia_fast.errors import InputError
from dia_fast.jobs.store import Folder, RemoteFolder, fetched, is_url
from tests.helpers.front import make_codec, make_model, tree


@pytest.fixture
def store() -> Iterator[Any]:
    """An object store in this process."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("store")
    make_model(folder / "model")
    make_codec(folder / "codec")
    (folder / "voices").mkdir()
    soundfile.write(folder / "voices" / "me.wav", 0.3 * np.sin(np.arange(12_000) / 20), 48_000)
    items: list[dict[str, Any]] = [{"id": f"i{number}", "text": "[S1] One. [S2] Two."} for number in range(4)]
    items[1] |= {"prompt": "voices/me.wav", "prompt_text": "[S1] Me."}
    items[2] |= {"prompt": "voices/nobody.wav", "prompt_text": "[S1] Me."}
    (folder / "in.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def batch(home: Path, source: str, folder: str) -> int:
    model = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--max-new-tokens", "30"]
    return main(["batch", source, folder, *model, "--quiet"])


def contents(store: Any, folder: str) -> dict[str, bytes]:
    return {path.removeprefix(f"/{folder}/"): bytes(store.cat(path)) for path in store.find(f"/{folder}")}


def test_urls_hold_what_a_folder_holds(home: Path, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(home, str(home / "in.jsonl"), str(home / "out")) == 1, "one recording is missing"
    told = capsys.readouterr().err
    store.pipe("/bucket/in.jsonl", (home / "in.jsonl").read_bytes())
    store.pipe("/bucket/voices/me.wav", (home / "voices" / "me.wav").read_bytes())
    assert batch(home, "memory://bucket/in.jsonl", "memory://bucket/out") == 1
    again = capsys.readouterr().err
    expected = {name: data for name, data in tree(home / "out").items() if data is not None}
    found = contents(store, "bucket/out")
    assert found.keys() == expected.keys() and len(found) == 4
    for name in found.keys() - {"manifest.jsonl"}:
        assert found[name] == expected[name]
    assert "nobody.wav" in told and "nobody.wav" in again
    lines = [json.loads(line) for line in found["manifest.jsonl"].splitlines()]
    assert [line["status"] for line in lines] == ["done", "done", "failed", "done"]

    before = dict(store.store)
    assert batch(home, "memory://bucket/in.jsonl", "memory://bucket/out") == 1
    kept = [name for name, file in store.store.items() if before.get(name) is file]
    assert sum(name.endswith(".wav") and "/out/" in name for name in kept) == 3, "nothing is done twice"
    store.pipe("/bucket/out/i0.wav", b"damaged")
    batch(home, "memory://bucket/in.jsonl", "memory://bucket/out")
    assert contents(store, "bucket/out")["i0.wav"] == expected["i0.wav"], "a file of another size is made again"


def test_what_was_said_before_an_interruption_is_there(home: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dia_fast.jobs import runner

    entry = runner.Batch._entry
    count = 0

    def interrupted(self: Any, item: Any, spoken: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return entry(self, item, spoken)

    monkeypatch.setattr(runner.Batch, "_entry", interrupted)
    assert batch(home, str(home / "in.jsonl"), "memory://bucket/cut") == 130
    found = contents(store, "bucket/cut")
    assert sum(name.endswith(".wav") for name in found) == 1 and found["manifest.jsonl"].count(b'"done"') >= 1


def test_an_upload_that_fails_is_an_error_of_its_item(
    home: Path, store: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put: Callable[..., Any] = type(store).put_file

    def full(self: Any, source: str, target: str, *more: Any, **options: Any) -> Any:
        if target.endswith("i3.wav"):
            raise OSError("quota exceeded")
        return put(self, source, target, *more, **options)

    monkeypatch.setattr(type(store), "put_file", full)
    assert batch(home, str(home / "in.jsonl"), "memory://bucket/full") == 1
    assert "(i3): memory://bucket/full: cannot be used: quota exceeded" in capsys.readouterr().err
    assert "i3.wav" not in contents(store, "bucket/full")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://nothing/in.jsonl", "there is nothing at this URL"),
        ("nosuch://a/b", "nosuch"),
    ],
)
def test_urls_that_cannot_be_read(url: str, told: str, store: Any) -> None:
    with pytest.raises(InputError, match=told), fetched(url):
        pass


def test_a_store_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(InputError, match=r'pip install "dia-fast\[s3\]"'):
        RemoteFolder("s3://bucket/out")


def test_recordings_outside_the_folder_are_not_fetched(store: Any, tmp_path: Path) -> None:
    store.pipe("/secret.wav", b"sound")
    store.pipe(
        "/bucket/in.jsonl", b'{"text": "[S1] Hi.", "prompt": "../secret.wav"}\n{"prompt": "/etc/hostname"}\nno\n'
    )
    with fetched("memory://bucket/in.jsonl") as path:
        assert [item.name for item in path.parent.iterdir()] == ["in.jsonl"]
        assert not (path.parent.parent / "secret.wav").exists()
    assert not path.exists()


def test_paths_are_no_urls(tmp_path: Path) -> None:
    assert is_url("s3://a") and not is_url("a/b") and not is_url("C:\\a")
    assert Folder(tmp_path).size("none") is None
