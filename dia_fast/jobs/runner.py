"""Many scripts from a JSON Lines file through one engine; after a kill it goes on where it was.

Each item becomes a file that appears complete or not at all, and then a line of `manifest.jsonl`. What an item sounds
like depends on nothing but its line, the options and the model, so an interrupted run that is started again ends with
the same bytes as one that was not.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dia_fast.audio.audio import Audio, Samples, load_audio
from dia_fast.errors import DiaFastError, InputError
from dia_fast.generation.inputs import params_for
from dia_fast.generation.long_form import Script, cut, speak_all
from dia_fast.generation.outcome import Outcome
from dia_fast.generation.prompts import MIN_SECONDS, Voice, encode_prompts
from dia_fast.jobs.items import Failed, Item
from dia_fast.jobs.manifest import Manifest, done_entry, failed_entry
from dia_fast.jobs.store import Folder
from dia_fast.utils.out_of_memory import out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

    from dia_fast.api import Dia

_RATE, _MOST_SECONDS = 44_100, 35.0  # of the official model


@dataclass
class Totals:
    """Items `done` in this run, `before` it, `failed` or `partial`; `seconds` of sound made in this run."""

    done: int = 0
    before: int = 0
    failed: int = 0
    partial: int = 0
    seconds: float = 0.0


class Batch:
    """A file of scripts, the folder for their sound, and what is left to do.

    Args:
        items: As from `read_items`.
        folder: Made if it is missing. `pending` are the items that the manifest does not know as done, or knows with
            other sampling parameters: those are done again, over the old file. An item that failed before is tried
            again.

    Raises:
        InputError: For a manifest that is damaged or not one.
    """

    def __init__(self, items: Sequence[Item | Failed], folder: Path | Folder) -> None:
        self.items = items
        self.store = Folder(folder) if isinstance(folder, Path) else folder
        self.folder = folder = self.store.path
        self.failed = [item for item in items if isinstance(item, Failed)]
        self.manifest = Manifest(folder / "manifest.jsonl")
        self._look()

    def _look(self) -> None:
        entries = self.manifest.load()
        good = [item for item in self.items if isinstance(item, Item)]
        self.pending = [item for item in good if not _is_done(entries.get(item.id), item, self.store)]
        self.before = len(good) - len(self.pending)

    def check(self) -> list[Failed]:
        """Lines that cannot be used, recordings that are not sound among them; without a model, and writing nothing."""
        found = list(self.failed)
        heard: dict[Path, str | None] = {}
        for item in self.items:
            if isinstance(item, Item) and item.prompt is not None:
                if item.prompt not in heard:
                    try:
                        load_audio(item.prompt, _RATE, min_seconds=MIN_SECONDS, max_seconds=_MOST_SECONDS)
                        heard[item.prompt] = None
                    except InputError as error:
                        heard[item.prompt] = str(error)
                if (problem := heard[item.prompt]) is not None:
                    found.append(Failed(item.line, item.id, problem))
        return sorted(found, key=lambda failed: failed.line)

    def run(
        self,
        load: "Callable[[], Dia]",
        *,
        begun: Callable[[], None] | None = None,
        stepped: Callable[[int], None] | None = None,
        ended: "Callable[[Totals, dict[str, Any]], None] | None" = None,
    ) -> Totals:
        """Speak what is pending in this process, as many segments at a time as the engine takes.

        Args:
            load: Called if anything is pending.
            begun: Called once the model is loaded.
            stepped: Called after each step with the number of requests that it was for.
            ended: As in `run_on`.

        Raises:
            InputError: As in `run_on`.
        """

        def speak(items: Sequence[Item]) -> Generator[Spoken, None, None]:
            dia = load()
            dia.codec  # noqa: B018 - a codec that cannot be loaded is no fault of an item
            if begun is not None:
                begun()
            return speak_items(dia, items, stepped)

        return self.run_on(speak, ended=ended)

    def run_on(
        self,
        speak: Callable[[Sequence[Item]], Generator["Spoken", None, None]],
        *,
        ended: "Callable[[Totals, dict[str, Any]], None] | None" = None,
    ) -> Totals:
        """Write what `speak` makes of the pending items, in whatever order it comes; then sort the manifest.

        Ctrl-C is raised after everything was left as a later run needs it.

        Args:
            speak: Called once, if anything is pending.
            ended: Called after each item that was done or failed, with its entry in the manifest.

        Raises:
            InputError: The folder cannot be used, or another process is using it.
        """
        totals = Totals()

        def close(entry: dict[str, Any]) -> None:
            self.manifest.append(entry)
            self.store.publish(self.manifest.path.name)
            if entry["status"] == "failed":
                totals.failed += 1
            elif entry["status"] == "partial":
                totals.partial += 1
                totals.seconds += entry["duration"]
            else:
                totals.done += 1
                totals.seconds += entry["duration"]
            if ended is not None:
                ended(totals, entry)

        with _held(self.folder):
            self._look()  # another run may have ended since
            totals.before = self.before
            try:
                with self.manifest:
                    for failed in self.failed:
                        close(failed_entry(failed.line, failed.id, failed.error))
                    if self.pending:
                        items = {item.id: item for item in self.pending}
                        with contextlib.closing(speak(self.pending)) as made:
                            for spoken in made:
                                close(self._entry(items[spoken.id], spoken))
                self.manifest.sort([(item.line, item.id) for item in self.items])
            finally:
                self.store.publish(self.manifest.path.name, now=True)
        return totals

    def _entry(self, item: Item, spoken: "Spoken") -> dict[str, Any]:
        """Write the sound of an item; return its entry."""
        if spoken.outcome is None:
            return failed_entry(item.line, item.id, spoken.error)
        if not len(spoken.samples):
            entry = failed_entry(item.line, item.id, spoken.error)
            return {**entry, "outcome": spoken.outcome.described()}
        try:
            audio = Audio(spoken.samples, spoken.sample_rate)
            path = self.folder / item.file
            audio.save(path)
            size = path.stat().st_size
            self.store.keep(item.file)
            return done_entry(item, audio.duration, size, spoken.outcome)
        except Exception as error:
            return failed_entry(item.line, item.id, _said(error))


@dataclass(frozen=True)
class Spoken:
    """The result of an item.

    Attributes:
        id: Of the item.
        samples: `[n]` float32.
        sample_rate: Of the samples, in Hz.
        outcome: None if there is no sound because of an error.
        error: Why there is no sound.
    """

    id: str
    samples: Samples
    sample_rate: int
    outcome: Outcome | None
    error: str = ""


def speak_items(
    dia: "Dia", items: Iterable[Item], stepped: Callable[[int], None] | None = None
) -> Generator[Spoken, None, None]:
    """Speak items, as many segments at a time as the engine takes; yield each as it ends, whatever the order.

    Args:
        stepped: As in `Batch.run`.
    """
    engine, failed = dia.engine, list[Spoken]()

    def after_step() -> None:
        if stepped is not None:
            stepped(engine.stats.running)

    at_once = engine.state.sizes.batch
    for script in speak_all(engine, _scripts(dia, items, failed), at_once, after_step, dia.codec):
        while failed:
            yield failed.pop(0)
        try:
            if script.error is not None:
                raise script.error
            samples = script.sound(dia.codec)
        except Exception as error:
            yield _without_sound(script.name, error)
        else:
            yield Spoken(script.name, samples, dia.codec.sample_rate, script.outcome, "; ".join(script.remarks))
    yield from failed


def _scripts(dia: "Dia", items: Iterable[Item], failed: list[Spoken]) -> Iterator[Script]:
    prompts: dict[bytes, Tensor] = {}
    rate = dia.codec.frames_per_second
    for item in items:
        try:
            params_for(dia.config, item.params)
            [codes] = encode_prompts(dia.config, [item.prompt], lambda: dia.codec, prompts)
            voice = None if codes is None else Voice(codes, item.prompt_text or "")
            segments = cut(item.text, dia.config, voice, rate) if item.split else [item.text]
            script = Script(dia.config, segments, item.params, voice, item.id, rate)
        except Exception as error:
            failed.append(_without_sound(item.id, error))
            continue
        yield script


def _without_sound(name: str, error: Exception) -> Spoken:
    return Spoken(name, np.zeros(0, np.float32), 0, None, _said(error))


def _is_done(entry: dict[str, Any] | None, item: Item, store: Folder) -> bool:
    """Tell whether the manifest knows the item, as it is now, and its file is still there."""
    if entry is None or entry["status"] != "done" or entry["fingerprint"] != item.fingerprint:
        return False
    return store.size(item.file) == entry["bytes"]


def _said(error: Exception) -> str:
    error = out_of_memory(error) or error
    return str(error) if isinstance(error, DiaFastError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other batches out of it. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder}: {error.strerror}") from error
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(
            f"another dia-fast batch is writing to {folder}: wait for it, or use another folder"
        ) from error
    finally:
        os.close(descriptor)
