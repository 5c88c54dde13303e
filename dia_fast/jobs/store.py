"""The places that a batch reads and writes: a folder of this machine, or a URL of fsspec, as s3://bucket/folder."""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dia_fast.errors import InputError
from dia_fast.utils.files import LARGEST_SOUND, LARGEST_TEXT

_EXTRAS = {"s3": "s3", "s3a": "s3"}
_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"})
"""Protocols of stores in which an object appears complete or not at all."""
_PUBLISH_SECONDS = 5.0


def is_url(text: str) -> bool:
    """Tell a URL from a path."""
    return "://" in text


class Folder:
    """A folder of this machine.

    Attributes:
        path: Where files are written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return None

    def keep(self, name: str) -> None:
        """Make a file that was written to `path` part of the folder."""

    def publish(self, name: str, *, now: bool = False) -> None:
        """Make the present contents of a file that grows part of the folder, soon or now."""


class RemoteFolder(Folder):
    """A folder at a URL; files are written to `path` on this machine first. Use it in a `with` block.

    Args:
        url: Of the folder. It need not exist.

    Raises:
        InputError: The URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root, self._protocol = _opened(self.url)
        self._temporary = tempfile.TemporaryDirectory(prefix="dia-fast-batch-")
        self._published = 0.0
        super().__init__(Path(self._temporary.name))
        with _told(self.url):
            self._sizes = {
                str(entry["name"]).rpartition("/")[2]: int(entry["size"])
                for entry in (self._fs.ls(self._root, detail=True) if self._fs.exists(self._root) else [])
                if entry["type"] == "file"
            }
            if "manifest.jsonl" in self._sizes:
                _copy(self._fs, f"{self._root}/manifest.jsonl", self.path / "manifest.jsonl", LARGEST_TEXT)

    def __enter__(self) -> "RemoteFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    def size(self, name: str) -> int | None:
        """As of the beginning, and of what was kept since."""
        return self._sizes.get(name)

    def keep(self, name: str) -> None:
        """Send a file to the URL, and remove it here."""
        path = self.path / name
        size = path.stat().st_size
        self._put(name)
        self._sizes[name] = size
        path.unlink()

    def publish(self, name: str, *, now: bool = False) -> None:
        """Send a file to the URL, at most once in some seconds unless `now`."""
        if now or time.monotonic() - self._published >= _PUBLISH_SECONDS:
            if (self.path / name).exists():
                self._put(name)
            self._published = time.monotonic()

    def _put(self, name: str) -> None:
        with _told(self.url):
            target = f"{self._root}/{name}"
            self._fs.makedirs(self._root, exist_ok=True)
            if self._protocol in _WHOLE:
                self._fs.put_file(str(self.path / name), target)
            else:
                self._fs.put_file(str(self.path / name), f"{target}.part")
                self._fs.mv(f"{target}.part", target)


@contextlib.contextmanager
def fetched(url: str) -> Iterator[Path]:
    """Copy a batch file and the recordings that it names, relative to it, to this machine.

    Args:
        url: Of the batch file.

    Yields:
        Its path, until the end of the block.

    Raises:
        InputError: It cannot be read.
    """
    fs, root, _ = _opened(url)
    with tempfile.TemporaryDirectory(prefix="dia-fast-input-") as temporary:
        path = Path(temporary) / (root.rpartition("/")[2] or "in.jsonl")
        with _told(url):
            _copy(fs, root, path, LARGEST_TEXT)
        for name in _prompts(path):
            target = (path.parent / name).resolve()
            if target.is_relative_to(path.parent.resolve()):  # the item itself tells what is missing
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(Exception):
                    _copy(fs, f"{root.rpartition('/')[0]}/{name}", target, LARGEST_SOUND)
        yield path


def _prompts(path: Path) -> set[str]:
    found = set[str]()
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(line)
            if isinstance(fields, dict) and isinstance(fields.get("prompt"), str) and "\0" not in fields["prompt"]:
                found.add(fields["prompt"])
    return found


def _copy(fs: Any, source: str, target: Path, largest: int) -> None:
    size = fs.size(source)
    if size is not None and size > largest:
        raise InputError(f"{source}: {size} bytes; at most {largest} are read")
    fs.get_file(source, str(target))


def _opened(url: str) -> tuple[Any, str, str]:
    """The file system of a URL, the path in it, and the protocol."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = f'pip install "dia-fast[{_EXTRAS[protocol]}]"' if protocol in _EXTRAS else f"pip install {error.name}"
        raise InputError(f"{url}: {protocol}:// needs a package that is not installed ({error}): {extra}") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error
    return fs, root, protocol


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{url}: there is nothing at this URL") from error
    except Exception as error:
        said = str(error).strip().splitlines()
        raise InputError(f"{url}: cannot be used: {said[0] if said else type(error).__name__}") from error
