"""A run on disk: what it was started with, its log, and states from which it goes on exactly where it was.

    run.json                  options and a digest of the data
    log.jsonl                 one line per step and per evaluation
    loss.png                  the same as a picture, where matplotlib is installed
    states/step-00000100.pt   trained weights and the optimizer's moments
    model/                    at the end: the checkpoint, in the layout of transformers
    adapter/                  at the end of a LoRA run: the adapters, in the layout of PEFT

Every file appears complete or not at all. A state is written after the log lines that lead to it have reached the disk,
so a run that was killed has at worst too many lines: they are cut off when it goes on.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from dia_fast.checkpoint.tensor_io import save_torch
from dia_fast.errors import InputError, shown
from dia_fast.training.options import FREE, TrainOptions
from dia_fast.utils.files import LARGEST_TEXT, parse_json, read_json, read_regular, replacing

_STATE = re.compile(r"step-(\d{8,})\.pt")


class Run:
    """The folder of a run. `create` begins one, `reopen` goes on with one."""

    def __init__(self, folder: Path, options: TrainOptions, digest: str | None) -> None:
        self.folder, self.options, self.digest = folder, options, digest
        self._log: TextIO | None = None

    @classmethod
    def create(cls, folder: Path, options: TrainOptions) -> "Run":
        """A new run in a new or empty folder.

        Raises:
            InputError: If there is something in it.
        """
        if (folder / "run.json").is_file():
            last = cls.reopen(folder, {}).last_step
            raise InputError(
                f"{folder} holds a run already, saved at step {last}: go on with it by --resume, or name another folder"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not an empty folder; name a new one, nothing is overwritten")
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"cannot write to {folder}: {existing} is not a folder that can be written to")
        return cls(folder, options, None)

    @classmethod
    def reopen(cls, folder: Path, given: Mapping[str, Any]) -> "Run":
        """An existing run.

        Args:
            given: Options that the caller names again.

        Raises:
            InputError: If there is none, or if an option that decides the result differs from that of the run.
        """
        path = folder / "run.json"
        if not path.is_file():
            raise InputError(f"{folder} holds no run to resume: it has no run.json")
        try:
            stored = read_json(path, InputError)
            before, digest = TrainOptions.from_dict(stored["options"]), stored["data"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged, the run cannot be resumed: {error}") from error
        options = TrainOptions.from_dict(before.to_dict() | dict(given))
        for name, value in options.to_dict().items():
            if name not in FREE and value != (old := before.to_dict()[name]):
                raise InputError(
                    f"cannot resume with another {name}: the run in {folder} was started with {old!r}, now it is "
                    f"{value!r}. Leave it out, or start a new run in another folder"
                )
        return cls(folder, options, digest)

    @property
    def last_step(self) -> int:
        """The step of the newest state, 0 if there is none."""
        return max(self._states(), default=0)

    @property
    def model(self) -> Path:
        """The folder of the finished checkpoint."""
        return self.folder / "model"

    def begin(self, digest: str) -> None:
        """Fix the data of a new run, or check that they are still the same; remove what a killed run left.

        Raises:
            InputError: If the data have changed, or if the folder cannot be written.
        """
        if self.digest is not None and digest != self.digest:
            raise InputError(
                f"the data changed since the run in {self.folder} began (other audio, texts or codec): it cannot go "
                "on exactly. Restore them, or start a new run in another folder"
            )
        try:
            (self.folder / "states").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}") from error
        with replacing(self.folder / "run.json") as temporary:
            stored = {"options": self.options.to_dict(), "data": digest}
            temporary.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        step = self.last_step
        kept = [line for line in self.lines() if line["step"] <= step] if step else []
        with replacing(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._log = (self.folder / "log.jsonl").open("a", encoding="utf-8")

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line, after `begin`."""
        assert self._log is not None
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        except OSError as error:
            raise InputError(f"cannot write {self.folder / 'log.jsonl'}: {error.strerror or error}") from error

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines of the log; a last one that was cut off in the middle is left out."""
        path = self.folder / "log.jsonl"
        for line in read_regular(path, LARGEST_TEXT).splitlines() if path.is_file() else ():
            try:
                entry = parse_json(line, str(path), InputError)
            except InputError:
                return
            if not isinstance(entry, dict) or type(entry.get("step")) is not int:
                raise InputError(f"{path} is damaged: {shown(entry)} is no line of a log")
            yield entry

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Write the state after a step and remove the oldest ones beyond `options.keep`."""
        if self._log is not None:
            try:
                os.fsync(self._log.fileno())
            except OSError as error:
                raise InputError(f"cannot write {self.folder / 'log.jsonl'}: {error.strerror or error}") from error
        with replacing(self._path(step)) as temporary, temporary.open("wb", buffering=0) as file:
            save_torch({"step": step, "weights": dict(weights), "optimizer": dict(optimizer)}, file)
        for old in sorted(self._states())[: -self.options.keep]:
            self._path(old).unlink()

    def load(self, step: int) -> dict[str, Any]:
        """Read what `save` wrote, on the CPU.

        Raises:
            InputError: If the file is damaged.
        """
        path = self._path(step)
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no error class of its own for a damaged file
            raise InputError(f"{path} is damaged ({error}); delete it to go on from the state before it") from error
        kinds = {"step": int, "weights": dict, "optimizer": dict}
        if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
            raise InputError(f"{path} is no state of a run; delete it to go on from the state before it")
        return state

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # `log` has flushed every line, or said that it could not
                self._log.close()

    def _states(self) -> list[int]:
        found = (_STATE.fullmatch(path.name) for path in self.folder.glob("states/*.pt"))
        return [int(match[1]) for match in found if match]

    def _path(self, step: int) -> Path:
        return self.folder / "states" / f"step-{step:08}.pt"
