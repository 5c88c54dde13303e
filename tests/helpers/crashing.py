"""Runs `dia-fast batch` again and again and kills it each time: `python -m tests.helpers.crashing HOME INPUT`.

HOME holds `model` and `codec`. One process imports everything and forks for each run, since imports take longest. Each
run goes into a folder `out-N` beside INPUT and ends in one of three ways: by SIGKILL at a random moment, by the process
ending without any cleanup right before or after a call that changes a file, or by SIGINT. Prints one line of JSON: how
each run ended, and what the folder held, as the SHA-256 of its visible files with their times of change.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dia_fast import Dia
from dia_fast.cli import main

ROUNDS, MOST_RUNS = 3, 40
CALLS = {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}


def contents(folder: Path) -> dict[str, list[Any]]:
    """Name -> SHA-256 and time of change, for all files that are not hidden."""
    files = sorted(folder.glob("[!.]*")) if folder.is_dir() else []
    return {file.name: [hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns] for file in files}


def run(command: list[str], prepare: Callable[[], None], kill: Callable[[int], None]) -> int:
    """Forks; the child prepares and runs the command, the parent may kill it. Returns the exit status, -9 if killed."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            prepare()
            status = main(command)
        finally:
            os._exit(status)
    kill(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_at(call: int, after: bool) -> Callable[[], None]:
    """Ends the process at the n-th call that makes a change to a file last, before or after it."""

    def prepare() -> None:
        count = 0
        for name in CALLS:

            def counted(*arguments: Any, name: str = name, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == call and not after:
                    os._exit(77)
                try:
                    return CALLS[name](*arguments, **named)
                finally:
                    if count == call:
                        os._exit(77)

            setattr(os, name, counted)

    return prepare


def signal_after(out: Path, seconds: float, number: int) -> Callable[[int], None]:
    """Send a signal so long after the next file has appeared."""

    def kill(child: int) -> None:
        before = len(contents(out))
        while len(contents(out)) == before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(child, number)

    return kill


def crash(home: Path, source: Path) -> None:
    torch.set_num_threads(1)
    dia = Dia.from_pretrained(home / "model", device="cpu", codec=home / "codec")
    assert dia.codec.sample_rate == 44_100  # what is imported late is imported now
    options = ["--model", str(home / "model"), "--codec", str(home / "codec"), "--device", "cpu", "-q"]
    options += ["--max-new-tokens", "40", "--batch-size", "2"]
    rounds: list[list[Any]] = []
    undisturbed = run(["batch", str(source), str(source.parent / "undisturbed"), *options], int, id)
    chance = random.Random(7)
    for number in range(ROUNDS):
        out = source.parent / f"out-{number}"
        runs: list[Any] = []
        while len(runs) < MOST_RUNS and not (runs and runs[-1][1] in (0, 1)):
            kind = (len(runs) + number) % 3
            prepare: Callable[[], Any] = int
            kill: Callable[[int], Any] = id
            if kind == 1:
                prepare = end_at(chance.randint(1, 8), chance.random() < 0.5)
            else:
                kill = signal_after(out, chance.uniform(0, 0.2), signal.SIGKILL if kind == 0 else signal.SIGINT)
            status = run(["batch", str(source), str(out), *options], prepare, kill)
            runs.append([kind, status, contents(out)])
        rounds.append(runs)
    print(json.dumps({"undisturbed": undisturbed, "rounds": rounds}))


if __name__ == "__main__":
    crash(Path(sys.argv[1]), Path(sys.argv[2]))
