"""Queues, keys, sizes, clients that leave or do not read, and the end of the process."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dia_fast import Dia
from tests.server.serving import LONG, RECORDED, SOON, TEXT, Server, serving

pytest.importorskip("fastapi", reason="the extra server is not installed")

KEY = {"Authorization": "Bearer open sesame"}


def ask(server: Server, text: str = LONG, **fields: object) -> socket.socket:
    """A request on a connection of its own, whose answer nobody reads yet."""
    body = json.dumps({"input": text, "response_format": "wav", "seed": 5, **fields}).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Authorization: Bearer open sesame\r\nContent-Type: application/json\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + body)
    return connection


def test_who_leaves_before_the_first_byte_is_noticed(server: Server) -> None:
    before = server.metric("disconnects_total")
    connection = ask(server, first_chunk_seconds=30)  # nothing to send for seconds
    with server.given_up():
        server.until("running", 1)
        connection.close()
    server.until("disconnects_total", before + 1)
    assert server.metric("pages") == 0 and server.metric("active") == 0


def test_who_leaves_in_the_middle_is_noticed(server: Server) -> None:
    with server.given_up():
        connection = ask(server)
        assert connection.recv(1000)
        connection.close()
    server.until("pages", 0)


def test_who_waits_in_the_queue_and_leaves_is_forgotten(tight: Server) -> None:
    first = ask(tight)
    tight_metric = _with_key(tight)
    tight_metric("running", 1)
    second = ask(tight)
    tight_metric("waiting", 1)
    refused = tight.call("/v1/audio/speech", {"input": TEXT}, **KEY)
    assert (refused.status, refused.error["code"]) == (429, "queue_full")
    assert refused.error["type"] == "rate_limit_error" and 1 <= int(refused.headers["retry-after"]) <= 60
    second.close()
    tight_metric("waiting", 0)
    first.close()
    tight_metric("running", 0)
    assert tight.call("/v1/audio/speech", {"input": TEXT, "seed": 3}, **KEY).status == 200


def test_who_gets_no_slot_in_time_is_told() -> None:
    with serving("--max-batch", "1", "--request-timeout", "0.5") as other:
        other.speak()  # what a first request loads
        first = ask(other)
        other.until("running", 1)
        start = time.monotonic()
        late = other.call("/v1/audio/speech", {"input": TEXT, "first_chunk_seconds": 60})
        assert (late.status, late.error["code"]) == (504, "timeout") and 0.4 < time.monotonic() - start < 0.5 + SOON
        first.close()
        other.until("running", 0)
        other.until("waiting", 0)


def _with_key(server: Server):  # type: ignore[no-untyped-def]
    def until(name: str, value: float) -> None:
        start = time.monotonic()
        while f"dia_fast_{name} {value}" not in server.call("/metrics", **KEY).body.decode():
            assert time.monotonic() - start < 20, name
            time.sleep(0.02)

    return until


def test_only_a_key_opens(tight: Server) -> None:
    body = {"input": TEXT}
    for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "Basic open sesame"}):
        refused = tight.call("/v1/audio/speech", body, **headers)
        assert refused.status == 401 and refused.error["type"] == "authentication_error"
        assert refused.headers["www-authenticate"] == "Bearer"
    assert tight.call("/metrics").status == tight.call("/v1/models").status == 401
    assert tight.call("/v1/models", **KEY).status == 200
    assert tight.call("/health").status == tight.call("/ready").status == 200
    assert not any("open sesame" in line for line in tight.log)


def test_large_bodies_are_refused_however_they_come(tight: Server) -> None:
    told = tight.call("/v1/audio/speech", {"input": TEXT, "more": "x" * 80_000}, **KEY)
    assert told.status == 413 and told.error["type"] == "invalid_request_error"
    connection = socket.create_connection(("127.0.0.1", tight.port))
    head = "POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    connection.sendall((head + "Authorization: Bearer open sesame\r\nContent-Type: application/json\r\n\r\n").encode())
    connection.sendall((b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 5)
    assert b" 413 " in connection.recv(100)


def test_other_names_and_origins_are_refused(server: Server) -> None:
    assert server.call("/v1/models", Host="evil.example").error["code"] == "host_not_allowed"
    assert server.call("/v1/models", Host="localhost:1234").status == 200
    assert server.call("/v1/models", Origin="http://evil.example").error["code"] == "origin"
    assert server.call("/v1/models", Origin=server.url).status == 200


def test_lines_of_the_log_hold_no_texts(tight: Server) -> None:
    tight.call("/v1/audio/speech", {"input": TEXT, "seed": 3, "voice": "alloy"}, **KEY, X_Request_Id="find-me")
    time.sleep(0.1)  # the line is written after the last byte
    [line] = [json.loads(line) for line in tight.log if "find-me" in line]
    assert line["status"] == 200 and line["seed"] == 3 and line["voice"] == "alloy" and line["sound"] > 1
    assert not any("red door" in line for line in tight.log)


def test_a_signal_lets_open_streams_end(server: Server) -> None:
    forms = ["wav", "flac", "mp3", "pcm"]
    whole = {form: server.spoken(response_format=form).body for form in forms}
    with serving("--drain-delay", "0.5") as other, ThreadPoolExecutor(8) as pool:
        jobs = [(form, pool.submit(other.speak, response_format=form)) for form in 2 * forms]
        other.until("running", 8)
        other.process.send_signal(signal.SIGTERM)
        while other.call("/ready").status == 200:
            pass
        refused = other.call("/v1/audio/speech", {"input": TEXT})
        assert (refused.status, refused.error["code"]) == (503, "draining") and refused.headers["retry-after"]
        assert all(job.result().body == whole[form] for form, job in jobs)
        assert other.process.wait(10) == 0
        assert not any("Traceback" in line or "ERROR" in line for line in other.log), other.log


def test_a_killed_server_starts_again_as_if_nothing_had_been(server: Server, tmp_path: Path) -> None:
    """Killed while it speaks and while a voice arrives: same port, same voices, same bytes, nothing half-written."""
    sound = Dia.from_pretrained("demo").generate(RECORDED, seed=3).to_bytes("wav")
    options = ("--voices", str(tmp_path / "voices"), "--uploads")
    (tmp_path / "voices").mkdir()
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def upload(other: Server, name: str) -> int:
        parts = {"name": name.encode(), "ref_text": TEXT.encode()}
        body = b"".join(
            b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (key.encode(), value)
            for key, value in parts.items()
        )
        body += (
            b'--x\r\nContent-Disposition: form-data; name="audio_sample"; filename="a.wav"\r\n\r\n'
            + sound
            + b"\r\n--x--\r\n"
        )
        return other.call("/v1/audio/voices", body, Content_Type="multipart/form-data; boundary=x").status

    with serving(*options, **cache) as first, ThreadPoolExecutor(9) as pool:
        assert upload(first, "kept") == 200
        port = first.port
        connections = [ask(first) for _ in range(8)]
        first.until("running", 8)
        arriving = pool.submit(upload, first, "cut-off")
        time.sleep(0.05)
        first.process.kill()
        assert first.process.wait(10) == -signal.SIGKILL
        with contextlib.suppress(OSError):
            arriving.result()
        for connection in connections:
            connection.close()
    with serving(*options, "--port", str(port), **cache) as second:
        assert second.port == port
        assert second.speak(response_format="flac").body == server.spoken(response_format="flac").body
        recordings = [
            item["id"] for item in second.call("/v1/audio/voices").json["data"] if item["type"] == "recording"
        ]
        assert recordings in (["kept"], ["cut-off", "kept"])
        assert not any("cannot be used" in line or "Traceback" in line for line in second.log), second.log
        if "cut-off" not in recordings:  # its name is free: what was half written is in nobody's way
            assert upload(second, "cut-off") == 200
        assert second.metric("running") == second.metric("pages") == 0


def test_a_second_signal_ends_at_once() -> None:
    with serving() as other:
        connection = ask(other, LONG * 4)
        other.until("running", 1)
        start = time.monotonic()
        other.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        other.process.send_signal(signal.SIGTERM)
        assert other.process.wait(10) == 0 and time.monotonic() - start < 0.3 + 2 * SOON
        connection.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "no-auth"),
        (["--host", "nowhere.invalid", "--no-auth"], "cannot listen"),
        (["--max-queue", "-1"], "--max-queue must be 0 or more"),
        (["--model", "no/such/folder", "--offline", "--port", "0"], "no/such/folder"),
    ],
)
def test_what_cannot_be_served_is_one_line(options: list[str], told: str) -> None:
    command = [sys.executable, "-m", "dia_fast", "serve", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
