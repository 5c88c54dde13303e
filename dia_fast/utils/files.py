"""Files that are not ours: read only what is a regular file of a size that makes sense, write so that nothing is lost.

Every writer works in a temporary folder `.dia-fast-*.part` beside its target, and moves the result into place in the
end. The folder is locked (`flock`) while its owner lives, wherever that runs: `sweep` removes those that nobody holds.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, BinaryIO

from dia_fast.errors import CheckpointError, DiaFastError, InputError, shown

try:
    import fcntl
except ImportError:  # not on Windows: nothing is locked there, and nothing swept
    fcntl = None  # type: ignore[assignment]

MAX_JSON_BYTES = 64 << 20
# Far more than any file that is read here has; beyond it even printing a value can exhaust the stack.
MAX_JSON_DEPTH = 64
LARGEST_TEXT = 1 << 30  # of a list of items, or a log
LARGEST_SOUND = 1 << 30

NOT_REGULAR = "not a regular file"

_TEMPORARY = re.compile(r"\.dia-fast-[0-9a-f]{16}\.part")
_swept: set[Path] = set()
_alive: set[Path] = set()


def checked_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The path that a caller gave, `~` expanded; whether there is something is not asked.

    Args:
        name: Of the argument, for messages.

    Raises:
        InputError: For a value that is no path, or one that the system cannot look up: too long, with a null character,
            or behind a folder that may not be read.
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


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> BinaryIO:
    """Open a regular file to read, without waiting for a pipe or a device of that name.

    Args:
        path: Of the file, or of a link to it.
        limit: The largest size to accept, in bytes; None for any.

    Raises:
        OSError: Not there, not readable, not a regular file, larger than `limit`, or not a path at all; `strerror` says
            which.
    """

    def checked(path: str, flags: int) -> int:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, NOT_REGULAR, path)
            if limit is not None and status.st_size > limit:
                told = f"{status.st_size} bytes long, more than the {limit} that are taken"
                raise OSError(errno.EFBIG, told, path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    try:
        # The file owns the descriptor from the first: an interrupt must not close it twice.
        return open(os.fspath(path), "rb", opener=checked)
    except ValueError as error:  # a null character, a lone surrogate
        raise OSError(errno.EINVAL, f"not a path ({error})") from None


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes, even if it grows meanwhile.

    Raises:
        OSError: As `open_regular`.
    """
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than the {limit} bytes that are taken", os.fspath(path))
    return data


def read_json(path: Path, error: type[DiaFastError] = CheckpointError) -> Any:
    """The contents of a JSON file. Raises `error`, naming the file, if it cannot be read; see `parse_json`."""
    try:
        data = read_regular(path, MAX_JSON_BYTES)
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror or reason}") from None
    return parse_json(data, str(path), error)


def parse_json(data: str | bytes, where: str, error: type[DiaFastError] = CheckpointError) -> Any:
    """Parse a JSON text. Raises `error` for a text that is not JSON, or that nests or counts beyond any use.

    Args:
        where: The file, for messages. Integers must fit 64 bits, so that no later conversion overflows.
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


def writable(path: str | os.PathLike[str]) -> Path:
    """Find out where a file is to be written: at the end of symbolic links. Leaves nothing behind.

    Raises:
        InputError: The folder is missing or cannot be written to, or something other than a file has the name.
    """
    target = _target(path)
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            return target
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _target(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {target.parent} does not exist; create it first")
    try:
        status = _status(target)
        if status is not None and not stat.S_ISREG(status.st_mode):
            raise InputError(f"cannot write {path}: it is not a regular file")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return target


def sweep(folder: Path) -> None:
    """Remove what dead writers left in a folder; the temporary files of living ones, in any process, stay."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            if fcntl is None or not _TEMPORARY.fullmatch(entry.name) or entry.is_symlink():
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(Path(entry.path))
                finally:
                    os.close(descriptor)


def abandon() -> None:
    """Remove the temporary files of this process, which is about to end without unwinding."""
    for path in _alive:
        _remove(path)


class NotingFile:
    """A binary file for libraries that lose the reason why a write failed, or the failure itself: `check` raises it.

    Args:
        file: Open for writing, without a buffer.
        stop: When it becomes true, writes fail from then on; there is nothing to `check` then.
    """

    def __init__(self, file: BinaryIO, stop: Callable[[], bool] = lambda: False) -> None:
        self._file, self._stop = file, stop
        self._error: OSError | None = None
        self.seek, self.tell, self.read, self.flush = file.seek, file.tell, file.read, file.flush

    def write(self, data: Any) -> int:
        """As the file's own, whole; returns 0 where that fails, and from then on."""
        left = memoryview(data)
        if self._stop():
            return 0
        try:
            while left and self._error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._error = error
        return len(data) if self._error is None else 0

    def check(self) -> None:
        """Raise what a write has raised."""
        if self._error is not None:
            raise self._error


class _Terminated(BaseException):
    """SIGTERM or SIGHUP while a file was being written; ends the process once nothing is left of it."""


class _Signals:
    """Ctrl-C, SIGTERM and SIGHUP of the main thread: raised in the caller's block at once, held back in our own code.

    `held` is true while our code runs. Those that waited are delivered by `release` or `restore`.

    Args:
        own: A code object: while it is anywhere on the stack, signals wait, too.
    """

    def __init__(self, own: CodeType | None = None) -> None:
        self.held, self.over = True, False
        self._own = own
        self._waiting: list[int] = []
        self._before: dict[int, Any] = {}

    def take(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # handlers cannot be set here, and none runs here
        for name in ("SIGHUP", "SIGTERM", "SIGINT"):  # given back in this order: the one that goes on comes last
            number = getattr(signal, name, None)
            handler = signal.getsignal(number) if number is not None else None
            if number is not None and handler is not None and handler != signal.SIG_IGN:
                self._before[number] = handler
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.over and (self.held or self._within(frame)):
            self._waiting.append(number)
        else:
            self._pass_on(number, frame)

    def _within(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not self._own:
            frame = frame.f_back
        return frame is not None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if before != signal.SIG_DFL:
            before(number, frame)
        elif self.over:
            _die(number)
        else:
            self._waiting.append(number)
            raise _Terminated

    def release(self) -> None:
        """Raise those that came before, while others wait; from here on signals are raised."""
        while self._waiting:
            self._pass_on(self._waiting.pop(0), None)
        self.held = False

    def restore(self) -> None:
        """Give the handlers back, and the signals that waited to them."""
        for number, before in self._before.items():
            with contextlib.suppress(ValueError):  # another thread ends what the main one began
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, before)
        self.over = True
        for number in sorted(set(self._waiting), reverse=True):  # SIGTERM before SIGINT
            self._pass_on(number, None)


@contextlib.contextmanager
def uninterrupted() -> Iterator[Callable[[], bool]]:
    """Hold signals back during a block with calls back from C, where an exception would be lost.

    Yields:
        Tells whether a signal waits, for blocks that can end early.
    """
    signals = _Signals()
    signals.take()
    try:
        yield lambda: bool(signals._waiting)
    finally:
        signals.restore()


def _undo(folder: "_Locked", signals: _Signals) -> None:
    folder.remove()
    signals.restore()


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class _Locked:
    """A folder with a name of its own, and with a lock that tells others that its owner lives."""

    path: Path | None = None
    _descriptor: int | None = None

    def make(self, parent: Path) -> Path:
        while True:
            self.path = path = parent / _name()
            os.mkdir(path, 0o700)
            _alive.add(path)
            if fcntl is None:
                return path
            self._descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(path):
                    return path
            except BlockingIOError:
                pass  # somebody sweeps, and took the folder before it was locked
            except OSError:
                return path  # no locks in this file system: nobody can sweep here
            self.remove()

    def remove(self) -> None:
        if self.path is not None:
            _remove(self.path)
            _alive.discard(self.path)
            self.path = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Temporary:
    """A locked folder beside `target`, for the time of a `with` block, which gets the path to write to.

    However the block ends, the folder is gone afterwards; if it ends well, `_commit` has moved the result into place.
    An OSError of the block becomes `self.error`, with the name of the file that could not be written or read.
    """

    error: type[Exception] = InputError
    called = ""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __enter__(self) -> Path:
        self._signals, folder = _Signals(_Temporary.__exit__.__code__), _Locked()
        self._signals.take()
        # As a finalizer it serves as well where an interrupt falls between two instructions of a `with` statement.
        self._end = weakref.finalize(self, _undo, folder, self._signals)
        try:
            self.target = self._find()
            if self.target.parent not in _swept:
                sweep(self.target.parent)
                _swept.add(self.target.parent)
            self.temporary = self._make(folder.make(self.target.parent))
            self._signals.release()
            return self.temporary
        except OSError as error:
            self._end()
            raise self._said(error) from error
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._signals.held = True
            if kind is None:
                self._commit()
        except OSError as refused:
            raise self._said(refused) from refused
        finally:
            self._end()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise self._said(error) from error

    def _find(self) -> Path:
        """The place of the result, once links are followed."""
        raise NotImplementedError

    def _make(self, folder: Path) -> Path:
        """Make the path that the block gets, in the locked folder."""
        raise NotImplementedError

    def _commit(self) -> None:
        """Move the result into place."""
        raise NotImplementedError

    def _said(self, error: OSError) -> Exception:
        named = error.filename
        inside = not isinstance(named, str) or self._folder_of(named)
        what = f"cannot write {self.called}{self.path}"
        return self.error(f"{what}: {error.strerror or error}" if inside else f"{what}: {named}: {error.strerror}")

    def _folder_of(self, name: str) -> bool:
        """Tell whether a path is one of ours."""
        ours = [str(self.path), str(self.target)] if hasattr(self, "target") else [str(self.path)]
        return name in ours or any(_TEMPORARY.fullmatch(part) for part in Path(name).parts)


class replacing(_Temporary):
    """Yields a temporary path; what the block writes there becomes the file `path` at its end, at once.

    Whatever goes wrong (an exception, Ctrl-C, SIGTERM, a full disk), nothing is left of it and a file that stood at
    `path` before is untouched. The end of a symbolic link is replaced, not the link. A file that stood there keeps its
    mode and owner; one with further hard links is written in place once the new contents are complete and have room.

    Raises:
        InputError: Where the system refuses to write, saying why.
    """

    def _find(self) -> Path:
        return _target(self.path)

    def _make(self, folder: Path) -> Path:
        # With the mode that the user's mask gives it: some libraries write files that only their owner reads.
        descriptor = os.open(folder / "file", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        return folder / "file"

    def _commit(self) -> None:
        before = _status(self.target)
        with open(self.temporary, "rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the contents do
        os.chmod(self.temporary, self._mode if before is None else stat.S_IMODE(before.st_mode))
        if before is not None and before.st_nlink > 1:
            _fill(self.target, self.temporary)
            return
        if before is not None and hasattr(os, "chown"):
            with contextlib.suppress(OSError):  # only root may give files away
                own = os.stat(self.temporary)
                if (own.st_uid, own.st_gid) != (before.st_uid, before.st_gid):
                    os.chown(self.temporary, before.st_uid, before.st_gid)
        os.replace(self.temporary, self.target)


class replacing_folder(_Temporary):
    """As `replacing`, for a folder: yields one that is empty. An older one at `path` is replaced if it may be.

    Args:
        path: Of the folder; those above it are made.
        error: The class of the error where the system refuses.
        called: What to call it in that error, such as "the checkpoint ".
        over: Replace a folder that is not empty.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        error: type[Exception] = InputError,
        *,
        called: str = "",
        over: bool = False,
    ) -> None:
        super().__init__(path)
        self.error, self.called, self._over = error, called, over

    def _find(self) -> Path:
        target = Path(os.path.realpath(self.path))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _make(self, folder: Path) -> Path:
        made = folder / "folder"
        made.mkdir()
        return made

    def _commit(self) -> None:
        if self._over and self.target.is_dir():
            os.replace(self.target, self.temporary.parent / "older")  # removed with the rest
        os.replace(self.temporary, self.target)


def _fill(target: Path, source: Path) -> None:
    """Write the contents of one file into another that has several names; room is made before the old are touched."""
    size = source.stat().st_size
    with open(source, "rb") as new, open(target, "rb+") as file:
        before = os.fstat(file.fileno()).st_size
        if size > before:
            try:
                _allocate(file.fileno(), size)
            except OSError:
                file.truncate(before)
                raise
        shutil.copyfileobj(new, file)
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


def _allocate(descriptor: int, size: int) -> None:
    allocate: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if allocate is not None:
        allocate(descriptor, 0, size)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _name() -> str:
    return f".dia-fast-{secrets.token_hex(8)}.part"


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
