"""Stages of a recipe: each makes one file or folder, anew only if what it depends on has changed."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def save(value: Any, path: Path) -> None:
    """Write what torch can save; whoever is killed while writing leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def content(path: Path) -> str:
    """A hash of a file, or of all files below a folder with their names."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(path)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


@dataclass(frozen=True)
class Stage:
    """A step of the recipe.

    A result whose record says that it was made of the same things stays as it is. A stage that was stopped goes on with
    what it left, if that was begun with the same things; else it begins anew.

    Args:
        name: For the log, and of the record.
        result: The file or folder that it makes.
        reads: Results of earlier stages, and files of settings.
        settings: What else decides the result, as JSON can hold it.
        make: Makes the result; goes on where it was stopped if it can.
        parts: What an unfinished run leaves beside the result.
    """

    name: str
    result: Path
    reads: tuple[Path, ...]
    settings: dict[str, Any]
    make: Callable[[], None]
    parts: tuple[Path, ...] = ()

    def run(self, records: Path) -> bool:
        """Make the result unless the one that is there was made of the same; tell whether it was made.

        records: the folder that remembers of what results were made.
        """
        record, begun = records / f"{self.name}.json", records / f"{self.name}.begun.json"
        reads = {path.name: content(path) for path in self.reads}
        wanted = json.dumps({"settings": self.settings, "reads": reads}, indent=1)
        if self.result.exists() and _text(record) == wanted:
            print(f"{self.name}: there already", flush=True)
            return False
        started = time.monotonic()
        record.unlink(missing_ok=True)
        if _text(begun) != wanted:
            for path in (self.result, *self.parts):
                _remove(path)
            records.mkdir(parents=True, exist_ok=True)
            begun.write_text(wanted)
        self.make()
        os.replace(begun, record)
        print(f"{self.name}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        return True


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
