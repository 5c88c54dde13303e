"""Writing files so that a failure leaves nothing behind."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from dia_fast.errors import InputError


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
