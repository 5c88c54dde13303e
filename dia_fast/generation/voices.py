"""Voices by name: recordings in a folder, each with what is said in it.

The voice `me` is `me.wav` (or .flac, .ogg, .mp3) and its transcript `me.txt`, as for `dia-fast serve --voices`.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from dia_fast.audio.audio import FORMATS
from dia_fast.errors import InputError, shown
from dia_fast.text.tokenizer import ABSURD_BYTES, checked_text
from dia_fast.utils.files import LARGEST_SOUND, read_regular, replacing

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@dataclass(frozen=True)
class SavedVoice:
    """A recording and its transcript; text: None if there is none."""

    name: str
    path: Path
    text: str | None


def voices_folder() -> Path:
    """Return the folder of voices: `dia-fast/voices` in the user's folder for data."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "dia-fast" / "voices"


def saved_voices(folder: Path | None = None, name: str | None = None) -> list[SavedVoice]:
    """List the voices of a folder by name, or that of one name. Raises InputError for an unreadable transcript."""
    folder = voices_folder() if folder is None else folder
    if not folder.is_dir():
        return []
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in FORMATS and NAME.match(path.stem) and name in (None, path.stem)
    )
    return [SavedVoice(path.stem, path, _transcript(path)) for path in paths if path.is_file()]


def find_voice(name: str, folder: Path | None = None) -> SavedVoice | None:
    """Find the voice of a name; None if there is none."""
    if not NAME.match(name):
        return None
    return next(iter(saved_voices(folder, name)), None)


def missing(source: str) -> InputError:
    """Return the error for the name of a recording that neither a file nor a saved voice has."""
    known = ", ".join(voice.name for voice in saved_voices()) or "none"
    return InputError(f"{shown(source)}: no such recording, and no saved voice (there are: {known})")


def recording_of(source: str | os.PathLike[str], text: str | None) -> tuple[Path, str]:
    """Find the recording and the transcript of a voice.

    Args:
        source: A recording; a folder with one and its transcript; or the name of a saved voice.
        text: The transcript, if it is not the one in the `.txt` file beside the recording.

    Raises:
        InputError: If one of the two is missing.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = saved_voices(path)
        if len(found) != 1:
            raise InputError(f"{path}: a folder of a voice holds one recording, not {len(found)}")
        path = found[0].path
    elif not path.exists() and (saved := find_voice(os.fspath(source))) is not None:
        path = saved.path
    elif not path.is_file():
        raise missing(os.fspath(source))
    said = _transcript(path) if text is None else text
    if said is None:
        raise InputError(f"{path}: give text, or write what is said in it to {path.with_suffix('.txt')}")
    return path, checked_text(said).strip()


def add_voice(name: str, recording: Path, text: str, folder: Path | None = None) -> SavedVoice:
    """Copy a recording and its transcript into a folder. Raises InputError for a name that is none, or is taken."""
    folder = voices_folder() if folder is None else folder
    if not NAME.match(name):
        raise InputError(f"a voice's name is 1 to 64 letters, digits, - and _, not {shown(name)}")
    if find_voice(name, folder) is not None:
        raise InputError(f"there is a voice {name} already, in {folder}")
    if recording.suffix.lower() not in FORMATS:
        raise InputError(f"{recording}: its extension must be one of {', '.join(FORMATS)}")
    text = checked_text(text).strip()
    try:
        read_regular(recording, LARGEST_SOUND)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}{recording.suffix.lower()}"
        with replacing(path.with_suffix(".txt")) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        with replacing(path) as temporary:
            shutil.copyfile(recording, temporary)
    except OSError as error:
        raise InputError(f"{error.filename or recording}: {error.strerror or error}") from error
    return SavedVoice(name, path, text)


def _transcript(recording: Path) -> str | None:
    path = recording.with_suffix(".txt")
    try:
        return read_regular(path, ABSURD_BYTES).decode("utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
