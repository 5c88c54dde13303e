"""A server process with the demo voice, and the least of a client."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError

TEXT = "[S1] Open the red door."
RECORDED = "[S1] Please open the red door. [S2] Please close the white window."  # long enough for a voice
LONG = 2 * (
    "[S1] Please open the red door. Please close the white window. Call the office. Hello, good morning. "
    "[S2] Yes, good evening. The number is seven four two. My house is in the black garden, please. "
)

SOON = 2.0  # seconds within which what a client gives up is free; the speech in question takes longer


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, of exactly the fields that the OpenAI API has."""
        found = self.json["error"]
        assert set(self.json) == {"error"} and set(found) == {"message", "type", "param", "code"}
        assert isinstance(found["message"], str) and found["message"]
        return dict(found)


class Server:
    """A process that serves at `url`; what it writes to standard error is in `log`."""

    def __init__(self, process: "subprocess.Popen[str]", patience: float = 60) -> None:
        self.process, self.log, self._told = process, list[str](), threading.Event()
        self._spoken: dict[str, Answer] = {}
        self.port = 0
        threading.Thread(target=self._read, daemon=True).start()
        assert self._told.wait(patience), self.log
        assert self.port, self.log

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if found := re.search(r"http://\S+?:(\d+) serves", line):
                self.port = int(found[1])
                self._told.set()
        self._told.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, path: str, body: Any = None, *, method: str | None = None, patience: float = 60, **headers: str
    ) -> Answer:
        """One request; a body that is not bytes goes as JSON."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body
        if body is not None and not isinstance(body, bytes):
            data = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(self.url + path, data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=patience) as answer:
                return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        except HTTPError as error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def speak(self, text: str = TEXT, **fields: Any) -> Answer:
        return self.call("/v1/audio/speech", {"input": text, "seed": 3, "response_format": "wav", **fields})

    def spoken(self, **fields: Any) -> Answer:
        """As `speak`, alone; remembered, since the same request is to give the same bytes."""
        key = json.dumps(fields, sort_keys=True)
        if key not in self._spoken:
            self._spoken[key] = self.speak(**fields)
        return self._spoken[key]

    def metric(self, name: str) -> float:
        page = self.call("/metrics").body.decode()
        return sum(float(line.split()[-1]) for line in page.splitlines() if re.match(rf"dia_fast_{name}[{{ ]", line))

    def until(self, name: str, value: float, seconds: float = 20.0) -> float:
        """Wait until a metric has a value; returns the seconds that took."""
        start = time.monotonic()
        while self.metric(name) != value:
            assert time.monotonic() - start < seconds, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.01)
        return time.monotonic() - start

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """See that what a client gives up in the block is ended, and not spoken to its end."""
        self.until("active", 0)  # what was spoken before is counted only then
        before = self.metric("audio_seconds_total")
        yield
        self.until("running", 0)
        self.until("active", 0)
        assert self.metric("audio_seconds_total") == before, "it was spoken to its end"

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def serving(*options: str, patience: float = 60, **environment: str) -> Iterator[Server]:
    """A server until the end of the block, ready for requests."""
    command = [sys.executable, "-m", "dia_fast", "serve", "--port", "0", *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith("DIA_FAST_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env | environment)
    try:
        server = Server(process, patience)
        start = time.monotonic()
        while server.call("/ready").status != 200:
            assert process.poll() is None and time.monotonic() - start < patience, server.log
            time.sleep(0.02)
        yield server
    finally:
        process.kill()
        process.wait()
