"""Files: nothing half-written, nothing lost, nobody's temporary file taken, nothing but regular files read."""

import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from dia_fast.audio.audio import Audio, growing_file
from dia_fast.checkpoint.saving import write_checkpoint
from dia_fast.checkpoint.tensor_io import save_torch
from dia_fast.errors import CheckpointError, InputError
from dia_fast.jobs.manifest import Manifest, failed_entry
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.utils import ambient, files
from dia_fast.utils.files import open_regular, read_regular, replacing, replacing_folder, sweep, writable
from tests.helpers.front import TINY, tree

ROOT = Path(__file__).resolve().parents[2]
RATE = 44_100
SOUND = np.sin(np.arange(2000, dtype=np.float32) / 9)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and locks")


class Interrupting:
    """Sends signals to this process at chosen lines of the package, counted from the first.

    Not where settings of the process are under a lock: a trace can raise between the end of a `with` and the release of
    its lock, where no signal is handled, and the lock would be held for ever.
    """

    def __init__(self, *lines: int, number: int = signal.SIGINT) -> None:
        self.at, self.number, self.count = lines, number, 0

    def __enter__(self) -> "Interrupting":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "dia_fast" not in name or name == ambient.__file__:
            return None
        if event == "line":
            self.count += 1
            if self.count in self.at:
                signal.raise_signal(self.number)
        return self._trace


def _replace(folder: Path) -> None:
    with replacing(folder / "a.bin") as temporary:
        temporary.write_bytes(b"new")


def _replace_linked(folder: Path) -> None:
    with replacing(folder / "linked.bin") as temporary:
        temporary.write_bytes(b"new, and longer than before")


def _replace_folder(folder: Path) -> None:
    with replacing_folder(folder / "sub", over=True) as temporary:
        (temporary / "b.bin").write_bytes(b"new")


def _save(folder: Path) -> None:
    Audio(SOUND, RATE).save(folder / "a.wav")


def _grow(folder: Path) -> None:
    with growing_file(folder / "a.flac", RATE) as write:
        write(SOUND)
        write(SOUND)


def _note(folder: Path) -> None:
    manifest = Manifest(folder / "manifest.jsonl")
    manifest.load()
    with manifest:
        manifest.append(failed_entry(1, "a", "new"))
    manifest.sort([(1, "a")])


WEIGHTS = {name: torch.zeros(shape) for name, shape in fused_shapes(TINY).items()}


def _checkpoint(folder: Path) -> None:
    dtypes = dict.fromkeys(WEIGHTS, torch.float32)
    write_checkpoint(folder / "model", TINY, dtypes, WEIGHTS.__getitem__)


def _old(folder: Path) -> None:
    for name in ("a.bin", "a.wav", "a.flac", "linked.bin"):
        (folder / name).write_bytes(b"old")
    os.link(folder / "linked.bin", folder / "other.bin")
    (folder / "manifest.jsonl").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.bin").write_bytes(b"old")


WRITERS: dict[str, tuple[Callable[[Path], None], int]] = {
    "file": (_replace, 1),
    "file with two names": (_replace_linked, 1),
    "folder": (_replace_folder, 1),
    "sound": (_save, 1),
    "growing sound": (_grow, 1),
    "manifest": (_note, 1),
    "checkpoint": (_checkpoint, 13),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # soundfile's, of a file that is gone
@pytest.mark.parametrize("name", WRITERS)
def test_interrupts_at_every_line_lose_nothing(tmp_path: Path, name: str) -> None:
    """Ctrl-C at each line in turn, and then at two lines: the old files or the new ones, and never anything beside."""
    write, stride = WRITERS[name]
    whole = tmp_path / "whole"
    whole.mkdir()
    _old(whole)
    before = tree(whole)
    with Interrupting() as counted:
        write(whole)
    after = tree(whole)
    interrupted = finished = 0
    choice = np.random.default_rng(3)
    for line in range(1, counted.count + 1, stride):
        folder = tmp_path / f"{line}"
        folder.mkdir()
        _old(folder)
        second = line + int(choice.integers(1, 12)) if line % 2 else line
        try:
            with Interrupting(line, second) as sent:
                write(folder)
            finished += sent.count >= line
        except KeyboardInterrupt:
            interrupted += 1
        gc.collect(0)
        found = tree(folder)
        if name != "manifest":  # lines are added to that one by one
            assert found in (before, after), f"line {line}: {sorted(found)}"
        assert not [file for file in found if file.startswith(".")], line
        assert os.stat(folder / "linked.bin").st_nlink == 2
    assert interrupted > 10 and not finished, "an interrupt was swallowed"
    INTERRUPTS[name] = interrupted


INTERRUPTS: dict[str, int] = {}


def test_there_were_enough_interrupts() -> None:
    if len(INTERRUPTS) < len(WRITERS):
        pytest.skip("counts those of the test before this one, which has not run whole")
    print(f"{sum(INTERRUPTS.values())} interrupts while files were written")
    assert sum(INTERRUPTS.values()) >= 1000


KILLED = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup lets what it starts ignore it
from dia_fast.utils.files import replacing, replacing_folder
with {kind}(Path(sys.argv[1]) / "target") as temporary:
    print("writing", flush=True)
    for _ in range(3000):
        time.sleep(0.01)
"""


def _writer(folder: Path, kind: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(kind=kind), str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("kind", ["replacing", "replacing_folder"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_removes_the_temporary_file_at_once(tmp_path: Path, kind: str, number: int) -> None:
    process = _writer(tmp_path, kind)
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -number  # Python ends with SIGINT itself after a KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_a_living_process_writes_stays_and_what_a_dead_one_left_goes(tmp_path: Path) -> None:
    living, dead = _writer(tmp_path, "replacing"), _writer(tmp_path, "replacing_folder")
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 2
    dead.kill()
    dead.communicate()
    (tmp_path / ".other.part").write_bytes(b"mine")
    with replacing(tmp_path / "mine") as temporary:
        temporary.write_bytes(b"new")
        sweep(tmp_path)
        assert temporary.exists()
    left = {path.name for path in tmp_path.iterdir()} & names
    assert len(left) == 1
    living.kill()
    living.communicate()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".other.part", "mine"}


def test_links_and_modes_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    target, link = tmp_path / "real" / "a.wav", tmp_path / "links" / "a.wav"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    (tmp_path / "links" / "dangling.wav").symlink_to("../real/b.wav")
    Audio(SOUND, RATE).save(link)
    Audio(SOUND, RATE).save(tmp_path / "links" / "dangling.wav")
    assert link.is_symlink() and target.read_bytes()[:4] == b"RIFF" and target.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "real" / "b.wav").read_bytes() == target.read_bytes()
    os.link(target, tmp_path / "hard.wav")
    for samples in (SOUND[:100], np.tile(SOUND, 3)):  # shorter and longer than what is there
        expected = Audio(samples, RATE)
        expected.save(tmp_path / "hard.wav")
        assert target.read_bytes() == expected.to_bytes() and target.samefile(tmp_path / "hard.wav")
    assert target.stat().st_mode & 0o777 == 0o600
    (tmp_path / "new").mkdir()
    (tmp_path / "folder").symlink_to("new")
    _checkpoint_to = replacing_folder(tmp_path / "folder")
    with _checkpoint_to as temporary:
        (temporary / "x").write_bytes(b"1")
    assert (tmp_path / "folder").is_symlink() and (tmp_path / "new" / "x").read_bytes() == b"1"


def test_a_file_with_two_names_is_whole_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")
    os.link(tmp_path / "a", tmp_path / "b")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="cannot write .*a: No space left"):
        with replacing(tmp_path / "a") as temporary:
            temporary.write_bytes(b"new, and longer")
    assert (tmp_path / "b").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("target", ["pipe", "/dev/null", "folder", "missing/a"])
def test_places_that_are_no_files(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(target)
    for path in (tmp_path / target, tmp_path / "link"):
        with pytest.raises(InputError, match="not a regular file|it is a folder|does not exist"):
            writable(path)
        with pytest.raises(InputError, match="cannot write"):
            with replacing(path):
                raise AssertionError("it was let in")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        write_checkpoint(tmp_path / "pipe" / "model", TINY, dict.fromkeys(WEIGHTS, torch.float32), WEIGHTS.__getitem__)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    (tmp_path / "good").write_bytes(b"12345")
    start = time.monotonic()
    for name, message in [
        ("pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("large", "1099511627776 bytes long, more than the 5 that are taken"),
        ("", "Is a directory"),
        ("none", "No such file"),
        ("a\0b", "not a path"),
    ]:
        path = os.path.join(tmp_path, name)
        for read in (open_regular, read_regular):
            with pytest.raises(OSError) as caught:
                read(path, 5)
            assert message in str(caught.value.strerror)
    assert read_regular(tmp_path / "good", 5) == b"12345"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_a_disk_that_is_full_for_the_last_bytes_is_told(tmp_path: Path, extension: str) -> None:
    """Encoders write their end when they are closed, and say nothing if that fails."""
    import resource

    noise = np.random.default_rng(0).normal(0, 0.1, 30_000).astype(np.float32)
    path = tmp_path / f"a.{extension}"
    with growing_file(path, RATE) as write:
        write(noise)
    whole = path.stat().st_size
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for missing in (1, 50, 700):
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole - missing, hard))
        try:
            with pytest.raises(InputError, match=f"cannot write .*a.{extension}: File too large"):
                with growing_file(path, RATE) as write:
                    write(noise)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_threads_write_without_handlers(tmp_path: Path) -> None:
    import threading

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=_save, args=(tmp_path,))
    thread.start()
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"] and signal.getsignal(signal.SIGINT) is before
    with contextlib.suppress(KeyboardInterrupt):
        with replacing(tmp_path / "b"):
            raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is before and len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_in_any_write_of_torch_is_ctrl_c() -> None:
    """torch writes from C++, which makes a RuntimeError of any exception. What is left to write is not written."""
    for at in range(1, 6):

        class File(io.BytesIO):
            writes = 0

            def write(self, data: Any) -> int:
                self.writes += 1
                if self.writes == at:  # noqa: B023
                    signal.raise_signal(signal.SIGINT)
                return super().write(data)

        file = File()
        with pytest.raises(KeyboardInterrupt):
            save_torch({f"{number}": torch.ones(9) for number in range(20)}, file)
        assert file.writes == at
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_whose_opening_is_interrupted_is_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed twice, its descriptor may be another thread's by then; and the error said so instead of what happened."""
    (tmp_path / "a").write_bytes(b"text")

    def interrupted(*args: Any, **named: Any) -> None:
        open(*args, **named).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "open", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        open_regular(tmp_path / "a")
