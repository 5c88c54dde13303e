"""Files by whatever name a caller gives: paths, JSON, and writing so that a failure leaves nothing behind."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dia_fast.errors import CheckpointError, DiaFastError, InputError, shown

MAX_JSON_BYTES = 64 << 20
# Far more than any file that is read here has; beyond it even printing a value can exhaust the stack.
MAX_JSON_DEPTH = 64


def checked_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The path that a caller gave, `~` expanded; whether there is something is not asked.

    name: of the argument, for messages. Raises InputError for a value that is no path, or one that the system cannot
    look up: too long, with a null character, or behind a folder that may not be read.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str) or not text:
        raise InputError(f"{name} must be a path, not {shown(path)}")
    if "\0" in text:
        raise InputError(f"{name}: {text!r:.600} is not a path: it holds a null character")
    text = os.path.expanduser(text)  # Path.expanduser raises for an unknown user
    try:
        os.stat(text)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise InputError(f"{name}: {text!r:.600} cannot be looked up: {error.strerror or error}") from None
    except ValueError as error:  # a character that the file system's encoding lacks
        raise InputError(f"{name}: {text!r:.600} is not a path: {error}") from None
    return Path(text)


def read_json(path: Path, error: type[DiaFastError] = CheckpointError) -> Any:
    """The contents of a JSON file. Raises `error`, naming the file, if it cannot be read; see `parse_json`."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is not a file")
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror or reason}") from None
    if len(data) > MAX_JSON_BYTES:
        raise error(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: not a file of settings")
    return parse_json(data, str(path), error)


def parse_json(data: str | bytes, where: str, error: type[DiaFastError] = CheckpointError) -> Any:
    """What a JSON text says. Raises `error` for a text that is not JSON, or that nests or counts beyond any use.

    where: the file, for messages. Integers must fit 64 bits, so that no later conversion overflows.
    """
    try:
        value = json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except RecursionError:
        raise error(f"{where} is not JSON that can be read: it nests too deep") from None
    except ValueError as reason:
        raise error(f"{where} is not JSON: {reason}") from None
    level, depth = [value], 0
    while level:
        if depth > MAX_JSON_DEPTH:
            raise error(f"{where}: values nest deeper than {MAX_JSON_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict | list):
                below.extend(item.values() if isinstance(item, dict) else item)
            elif isinstance(item, int) and not -(1 << 63) <= item < 1 << 64:
                raise error(f"{where} holds the integer {shown(item)}, which does not fit 64 bits")
        level, depth = below, depth + 1
    return value


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block writes there becomes `path` in one rename at its end.

    Whatever goes wrong (an exception, Ctrl-C, a full disk), the temporary file is gone afterwards and a file that stood
    at `path` before is untouched. Raises InputError where the system refuses to write, saying why.
    """
    path = Path(path)
    if not os.path.isdir(path.parent):
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    if os.path.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    # The target's own name may be too long to take a suffix.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the contents do
        os.chmod(temporary, 0o666 & ~umask())  # some libraries write files that only their owner may read
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def umask() -> int:
    """The process's file mode mask, which mkdtemp does not honour; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
