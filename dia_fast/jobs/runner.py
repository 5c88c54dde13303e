"""Many scripts from a JSON Lines file through one engine; after a kill it goes on where it was.

Each item becomes a file that appears complete or not at all, and then a line of `manifest.jsonl`. What an item sounds
like depends on nothing but its line, the options and the model, so an interrupted run that is started again ends with
the same bytes as one that was not.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dia_fast.audio.audio import Audio, load_audio
from dia_fast.errors import DiaFastError, InputError
from dia_fast.generation.inputs import params_for
from dia_fast.generation.long_form import Script, Voice, cut, longest_prompt, speak_all
from dia_fast.generation.prompts import MIN_SECONDS, encode_prompt
from dia_fast.jobs.items import Failed, Item
from dia_fast.jobs.manifest import Manifest, done_entry, failed_entry
from dia_fast.utils.files import sweep
from dia_fast.utils.out_of_memory import out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

    from dia_fast.api import Dia

_PROMPTS_KEPT = 64
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

    items: as from `read_items`. folder: made if it is missing. `pending` are the items that the manifest does not know
    as done, or knows with other sampling parameters: those are done again, over the old file. An item that failed
    before is tried again. Raises InputError for a manifest that is damaged or not one.
    """

    def __init__(self, items: Sequence[Item | Failed], folder: Path) -> None:
        self.items, self.folder = items, folder
        self.failed = [item for item in items if isinstance(item, Failed)]
        self.manifest = Manifest(folder / "manifest.jsonl")
        self._look()

    def _look(self) -> None:
        entries = self.manifest.load()
        good = [item for item in self.items if isinstance(item, Item)]
        self.pending = [item for item in good if not _is_done(entries.get(item.id), item, self.folder)]
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
        """Speaks what is pending, as many segments at a time as the engine takes; then sorts the manifest.

        load: called if anything is pending. begun: called once the model is loaded; stepped: after each step with the
        number of requests that it was for; ended: after each item that was done or failed, with its entry in the
        manifest. Raises InputError where the folder cannot be used, or another process is using it. Ctrl-C is raised
        after everything was left as a later run needs it.
        """
        totals = Totals()

        def close(entry: dict[str, Any]) -> None:
            self.manifest.append(entry)
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
            sweep(self.folder)
            with self.manifest:
                for failed in self.failed:
                    close(failed_entry(failed.line, failed.id, failed.error))
                if self.pending:
                    dia = load()
                    dia.codec  # noqa: B018 - a codec that cannot be loaded is no fault of an item
                    if begun is not None:
                        begun()
                    self._speak(dia, close, stepped)
            self.manifest.sort([(item.line, item.id) for item in self.items])
        return totals

    def _speak(
        self, dia: "Dia", close: Callable[[dict[str, Any]], None], stepped: Callable[[int], None] | None
    ) -> None:
        engine = dia.engine
        items = {item.id: item for item in self.pending}

        def after_step() -> None:
            if stepped is not None:
                stepped(engine.stats.running)

        for script in speak_all(engine, self._scripts(dia, close), engine.state.sizes.batch, after_step):
            item = items[script.name]
            try:
                if script.error is not None:
                    raise script.error
                close(self._save(dia, item, script))
            except Exception as error:
                close(failed_entry(item.line, item.id, _said(error)))

    def _scripts(self, dia: "Dia", close: Callable[[dict[str, Any]], None]) -> Iterator[Script]:
        prompts: dict[str, Tensor] = {}
        rate = dia.codec.frames_per_second
        for item in self.pending:
            try:
                params_for(dia.config, item.params)
                voice = None if item.prompt is None else Voice(_encoded(dia, item, prompts), item.prompt_text or "")
                segments = cut(item.text, dia.config, voice, rate) if item.split else [item.text]
                script = Script(dia.config, segments, item.params, voice, item.id, rate)
            except Exception as error:
                close(failed_entry(item.line, item.id, _said(error)))
                continue
            yield script

    def _save(self, dia: "Dia", item: Item, script: Script) -> dict[str, Any]:
        """Writes the sound of an item; returns its entry."""
        sound = script.sound(dia.codec)
        if not len(sound):
            entry = failed_entry(item.line, item.id, "; ".join(script.remarks))
            return {**entry, "outcome": script.outcome.described()}
        audio = Audio(sound, dia.codec.sample_rate)
        path = self.folder / item.file
        audio.save(path)
        return done_entry(item, audio.duration, path.stat().st_size, script.outcome)


def _is_done(entry: dict[str, Any] | None, item: Item, folder: Path) -> bool:
    """Whether the manifest knows the item, as it is now, and its file is still there."""
    if entry is None or entry["status"] != "done" or entry["fingerprint"] != item.fingerprint:
        return False
    try:
        return (folder / item.file).stat().st_size == entry["bytes"]
    except OSError:
        return False


def _encoded(dia: "Dia", item: Item, known: "dict[str, Tensor]") -> "Tensor":
    """The codes of an item's prompt; the last few recordings are remembered."""
    assert item.prompt is not None
    if item.prompt_digest not in known:
        decoder = dia.config.decoder
        codes = encode_prompt(
            item.prompt,
            lambda: dia.codec,
            channels=decoder.num_channels,
            codes=decoder.eos_token_id,
            max_frames=longest_prompt(dia.config),
        )
        assert codes is not None
        if len(known) == _PROMPTS_KEPT:
            known.pop(next(iter(known)))
        known[item.prompt_digest] = codes
    return known[item.prompt_digest]


def _said(error: Exception) -> str:
    error = out_of_memory(error) or error
    return str(error) if isinstance(error, DiaFastError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other batches out of it. Raises InputError."""
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
