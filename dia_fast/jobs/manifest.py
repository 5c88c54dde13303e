"""The record of a batch: a line of JSON for each item, appended as it ends, in the items' order at the end of a run."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from dia_fast.errors import InputError
from dia_fast.generation.outcome import Outcome
from dia_fast.jobs.items import Item
from dia_fast.utils.files import LARGEST_TEXT, read_regular, replacing

_BEGINNING = b'{"line": 0, "id": '
_DONE = {"line": int, "id": str, "file": str, "bytes": int, "fingerprint": str}


def done_entry(item: Item, duration: float, size: int, outcome: Outcome) -> dict[str, Any]:
    """The entry of an item with a file; its status is `"partial"` if a segment stayed silent, so that it is done again.

    duration: in seconds. size: of the file, in bytes. Nothing in it depends on when or how fast it was made.
    """
    return {
        "line": item.line,
        "id": item.id,
        "status": outcome.status,
        "file": item.file,
        "duration": round(duration, 6),
        "bytes": size,
        "segments": len(outcome.segments),
        "seed": item.params.seed,
        "sampling_params": item.described,
        "remarks": list(outcome.warnings),
        "outcome": outcome.described(),
        "fingerprint": item.fingerprint,
    }


def failed_entry(line: int, identity: str | None, error: str) -> dict[str, Any]:
    return {"line": line, "id": identity, "status": "failed", "error": error}


class Manifest:
    """The file. `load` it, then use it as a context to append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[str, dict[str, Any]] = {}
        self._failed: dict[int, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None

    def load(self) -> dict[str, dict[str, Any]]:
        """The entries of items that are done, by id; none if there is no file. Later lines replace earlier ones.

        Forgets what it knew. A last line that is not complete was being written when the run was killed, and counts for
        nothing.

        Raises:
            InputError: For any other line that is not an entry.
        """
        self._done, self._failed = {}, {}
        try:
            lines = read_regular(self.path, LARGEST_TEXT).split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            if number == len(lines) and _is_torn(line):
                continue
            entry = _entry(line)
            if entry is None:
                raise InputError(
                    f"{self.path}, line {number}: not a line of a manifest; move the file away, and all is done again"
                )
            if entry["status"] == "done":
                self._done[entry["id"]] = entry
            else:
                self._done.pop(entry["id"], None)
        return dict(self._done)

    def __enter__(self) -> "Manifest":
        self._write(self._done.values())
        self._file = open(self.path, "ab")
        return self

    def __exit__(self, *error: object) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry; it is on the disk afterwards."""
        assert self._file is not None
        if entry["status"] == "done":
            self._done[entry["id"]] = entry
        else:
            self._done.pop(entry["id"], None)
            self._failed[entry["line"]] = entry
        try:
            self._file.write(_line(entry))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error

    def sort(self, items: Iterable[tuple[int, str | None]]) -> None:
        """Rewrite the file: one line for each item, by (line, id), in this order, then what earlier inputs left."""
        entries = []
        rest = dict(self._done)
        for line, identity in items:
            if line in self._failed:
                entries.append(self._failed[line])
            elif identity in rest:
                entries.append({**rest.pop(identity), "line": line})
        self._write([*entries, *rest.values()])

    def _write(self, entries: Iterable[dict[str, Any]]) -> None:
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(map(_line, entries)))


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _is_torn(line: bytes) -> bool:
    """Tell whether a last line is the beginning of one of ours, of whatever length, rather than somebody else's."""
    begin = re.sub(rb"\d+", b"0", line, count=1)
    if not begin.startswith(_BEGINNING):
        return _BEGINNING.startswith(begin)
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return _entry(line) is not None


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry in a line, or None if there is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("status") not in ("done", "partial", "failed"):
        return None
    if entry["status"] == "failed":
        return entry if "id" in entry and isinstance(entry["id"], str | None) else None
    return entry if all(isinstance(entry.get(name), kind) for name, kind in _DONE.items()) else None
