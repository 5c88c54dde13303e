"""Commands that run one after another, each in a process group of its own and within a limit, whatever they do."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from dia_fast.utils.files import replacing

ROOT = Path(__file__).resolve().parent.parent
LEAST = 10.0  # seconds that must be left for a part to be begun
GRACE = 5.0  # seconds that a part has to clean up once it is told to end
TAIL = 40  # lines of what a part has said last

Clock = Callable[[], float]


@dataclass(frozen=True)
class Part:
    """A command, after the name of the interpreter.

    limit: seconds. shows: what it is for. needs, programs: packages and commands without which it is skipped. speed:
    whether it reports speeds of the whole model, which are worth nothing if the results are wrong. output: file in the
    report for what it prints to its standard output; the rest goes to a log.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    shows: str
    needs: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    speed: bool = False
    output: str | None = None


@dataclass
class Result:
    """Outcome of a part.

    status: "ok", "failed", "timed out", "skipped" (cannot run here), "left out" (could, but what it builds on is
    missing or wrong), "no time", "interrupted" or "not run"; reason: in words;
    exit: the exit status, negative for a signal; tail: the last lines of the output.
    """

    name: str
    status: str = "not run"
    reason: str = ""
    seconds: float = 0.0
    exit: int | None = None
    tail: str = ""


class Interrupted(Exception):
    """Ctrl-C, or a request to end, came during a part. result: what is known of it."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.name)
        self.result = result


class Runner:
    """Runs parts into a folder, within a budget of seconds for all of them. hidden: see `scrub`."""

    def __init__(
        self, folder: Path, budget: float, clock: Clock = time.monotonic, hidden: Mapping[Path, str] | None = None
    ) -> None:
        self.folder, self.clock, self.hidden = folder, clock, hidden or {}
        self.end = clock() + budget

    def run(self, part: Part) -> Result:
        """Run the command and return its outcome; nothing that it does raises. Raises Interrupted."""
        missing = [package for package in part.needs if not installed(package)]
        missing += [program for program in part.programs if shutil.which(program) is None]
        if missing:
            return Result(part.name, "skipped", f"{', '.join(missing)} is not installed")
        left = self.end - self.clock()
        if left < LEAST:
            return Result(part.name, "no time", "the time for the report was over")
        with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as output:
            result = self._run(part, min(part.limit, left), log, output if part.output else log)
            said = without_host(scrub(_text(log), self.hidden))
            printed = scrub(_text(output), self.hidden)  # for programs: the host's name may be a key's as well
        result.tail = "\n".join((said + printed).splitlines()[-TAIL:])
        self._keep(f"{part.name}.log", said)
        if part.output:
            self._keep(part.output, printed)
        if result.status == "interrupted":
            raise Interrupted(result)
        return result

    def _run(self, part: Part, limit: float, log: IO[bytes], output: IO[bytes]) -> Result:
        result, start = Result(part.name), self.clock()
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        try:
            process = subprocess.Popen(
                [sys.executable, *part.command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=log, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Result(part.name, "failed", f"could not be started: {error.strerror}")
        try:
            result.exit = process.wait(limit)
            result.status, result.reason = _meaning(result.exit)
        except subprocess.TimeoutExpired:
            result.status, result.reason = "timed out", f"was ended after {limit:.0f} s"
        except KeyboardInterrupt:
            result.status, result.reason = "interrupted", "was interrupted"
        finally:
            _end(process)
        result.seconds = round(self.clock() - start, 1)
        return result

    def _keep(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_text(text)


def _meaning(status: int) -> tuple[str, str]:
    if status == 0:
        return "ok", ""
    if status > 0:
        return "failed", f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return "failed", f"was ended by {signal.Signals(-status).name}"
    return "failed", f"was ended by signal {-status}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of a part and of what it has started: politely first, so that it can clean up."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def installed(package: str) -> bool:
    """Return True if a package can be imported; a stand-in without a place of its own does not count."""
    try:
        return find_spec(package) is not None
    except ValueError:
        return False


def scrub(text: str, hidden: Mapping[Path, str] | None = None) -> str:
    """Return the text without folders of the machine or its user. hidden: further ones, with what stands for each."""
    known = {
        ROOT: ".",
        Path(sys.prefix): "<environment>",
        Path(sys.base_prefix): "<python>",
        Path(tempfile.gettempdir()): "<temporary>",
        Path.home(): "~",
    }
    names = {str(path): name for folder, name in (known | dict(hidden or {})).items()
             for path in (folder, folder.resolve()) if len(path.parts) > 1}  # fmt: skip
    for path in sorted(names, key=len, reverse=True):  # what lies in another one first
        text = text.replace(path, names[path])
    return text


def without_host(text: str) -> str:
    """Return the text of a log without the name of the host, where that stands by itself."""
    host = socket.gethostname()
    return re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "<host>", text) if len(host) > 3 else text


def clean(folder: Path, hidden: Mapping[Path, str]) -> None:
    """Scrub the files that parts wrote by themselves."""
    for file in folder.rglob("*"):
        if file.suffix not in (".json", ".md", ".csv") or not file.is_file():
            continue
        text = file.read_text(errors="replace")
        try:
            # What JSON escapes would not be found in its text.
            found = json.loads(text) if file.suffix == ".json" else text
        except ValueError:  # of a part that was ended
            found = text
        cleaned = _scrubbed(found, hidden)
        if cleaned != found:
            file.write_text(cleaned if isinstance(cleaned, str) and found is text else json.dumps(cleaned, indent=1))


def _scrubbed(value: Any, hidden: Mapping[Path, str]) -> Any:
    if isinstance(value, str):
        return scrub(value, hidden)
    if isinstance(value, list):
        return [_scrubbed(item, hidden) for item in value]
    if isinstance(value, dict):
        return {scrub(key, hidden): _scrubbed(item, hidden) for key, item in value.items()}
    return value
