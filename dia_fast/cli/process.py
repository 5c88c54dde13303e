"""The process of a command: its standard streams and its signals. Imports nothing that takes time."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

closed: set[str] = set()
"""Names of the standard streams that were closed when the process began; what is written to them is dropped."""
interrupted = False
"""True once Ctrl-C was pressed during the command: C code may swallow the exception, or turn it into another."""


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Make standard streams and Ctrl-C safe for the time of a command.

    Closed streams lead nowhere, and their descriptors are taken, so that no file of ours gets them. A standard error
    that cannot be written to ends nothing. Ctrl-C during an import ends the process at once: libraries swallow the
    exception, or turn it into others.
    """
    global interrupted
    interrupted = False
    _open_streams()
    error, handler = sys.stderr, signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if main and handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    output = sys.stdout
    if error is sys.__stderr__:
        sys.stderr = cast(Any, _Tolerant(error))
    if output is sys.__stdout__:
        sys.stdout = cast(Any, _Strict(output))
    try:
        yield
    finally:
        sys.stderr, sys.stdout = error, output
        if main and signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, handler)
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            drop_output()  # Python would try again, and complain


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed, in case the first one was swallowed."""
    if interrupted:
        raise KeyboardInterrupt


def drop_output() -> None:
    """Lead standard output nowhere from now on."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _open_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        closed.add(name)
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        if number:
            stream = open(number, "w", closefd=False)  # noqa: SIM115 - as long as the process lives
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global interrupted
    interrupted = True
    if _importing(frame):
        abandon = getattr(sys.modules.get("dia_fast.utils.files"), "abandon", None)  # which is being imported, maybe
        if abandon is not None:
            abandon()
        with contextlib.suppress(OSError):
            os.write(2, b"dia-fast: interrupted\n")
        os._exit(130)
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


class OutputRefused(OSError):
    """Standard output takes nothing, as on a full disk; a reader that has gone is a BrokenPipeError."""


class _Stream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Strict(_Stream):
    """A standard output whose errors can be told from those of files."""

    def write(self, text: str) -> int:
        with _refusals():
            return int(self._stream.write(text))

    def flush(self) -> None:
        with _refusals():
            self._stream.flush()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputRefused(error.errno, error.strerror) from error


class _Tolerant(_Stream):
    """A standard error whose reader may have gone: what is said there is no reason to stop the work."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()
