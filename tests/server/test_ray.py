"""`dia-fast serve --ray` with two replicas on this machine: one is killed, and no client notices."""

import base64
import json
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.serving import LONG, Server, serving

pytest.importorskip("ray", reason="needs the extra ray: make test-ray")
import psutil

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--ray", "local", "--replicas", "2", "--threads", "1", patience=240) as running:
        yield running
        assert running.stop() == 0


def replicas() -> list[psutil.Process]:
    """The processes that hold an engine."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "Replica:dia-fast:Replica" in " ".join(process.info["cmdline"] or [])
    ]


def test_a_killed_replica_is_not_noticed(server: Server) -> None:
    texts = [f"{LONG}[S1] Number {word}." for word in "one two three four five six seven eight".split()]
    bodies: list[dict[str, Any]] = [
        {"input": text, "response_format": form, "seed": 3 if number % 2 else None, **more}
        for number, (text, (form, more)) in enumerate(
            zip(texts, 2 * [("pcm", {}), ("mp3", {}), ("flac", {}), ("wav", {"stream_format": "sse"})], strict=True)
        )
    ]
    parts: list[list[bytes]] = [[] for _ in bodies]
    seeds = [0] * len(bodies)

    def ask(number: int) -> None:
        data, headers = json.dumps(bodies[number]).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/v1/audio/speech", data, headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            seeds[number] = int(answer.headers["X-Seed"])
            while part := answer.read1():
                parts[number].append(part)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    while not all(parts):
        assert time.monotonic() - start < 300 and all(thread.is_alive() for thread in threads)
        time.sleep(0.05)
    before = replicas()
    assert len(before) == 2
    before[0].send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    for body, seed, told in zip(bodies, seeds, parts, strict=True):
        alone = server.call("/v1/audio/speech", {**body, "seed": seed}, patience=600).body
        if body.get("stream_format"):
            assert sound(b"".join(told)) == sound(alone) and b"speech.audio.done" in told[-1]
        else:
            assert b"".join(told) == alone


def sound(events: bytes) -> bytes:
    told = [part.partition(b"data: ")[2] for part in events.split(b"\n\n") if b"speech.audio.delta" in part]
    return b"".join(base64.b64decode(json.loads(item)["audio"]) for item in told)


def test_a_killed_replica_comes_back(server: Server) -> None:
    start = time.monotonic()
    while len(replicas()) < 2:
        assert time.monotonic() - start < 120
        time.sleep(0.5)
    assert server.call("/ready").status == 200


def test_an_address_where_nobody_is(capfd: pytest.CaptureFixture[str]) -> None:
    from dia_fast.cli import main

    start = time.monotonic()
    assert main(["serve", "--ray", "127.0.0.1:1"]) == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in capfd.readouterr().err
    assert time.monotonic() - start < 15
