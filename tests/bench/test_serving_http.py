"""A short form of the load test: the server holds, and the test would notice if it did not."""

import asyncio
import signal
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")

from bench import serving_http
from bench.serving_http import Job, Record, finish, serving, slope
from bench.tools import results


@pytest.mark.timeout(300)
def test_a_server_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")
    out = tmp_path / "load.json"
    options = ["--streams", "12", "--seconds", "5", "--hostile", "0.5", "--requests", "3", "--schemathesis"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for what a shell starts in the background
    try:
        assert serving_http.main([*options, "--json", str(out)]) == 0, capsys.readouterr().out
    finally:
        signal.signal(signal.SIGINT, before)
    found = {row["case"]["figure"]: row["values"] for row in results.read(out)["results"]}
    assert found["requests"]["finished"] and found["requests"]["hostile"]
    assert "schemathesis" in found["requests"], "it ran, though 5 s may be too short for its first request"
    assert not found["faults"] and found["first byte, seconds"]["p50"] > 0
    assert found["server, seconds a request"]["cpu"] > 0 < found["engine alone, seconds a request"]["cpu"]
    assert "growth a minute" in capsys.readouterr().out


def test_what_is_wrong_is_noticed() -> None:
    async def listen(port_of: serving_http.Server) -> Record:
        while (await serving_http.call(port_of.port, "GET", "/ready")).status != 200:
            await asyncio.sleep(0.05)
        record = Record()
        fields = {"input": serving_http.TEXTS[0], "seed": 3, "response_format": "pcm"}
        await finish(port_of, Job(fields, b"something else"), record)
        assert not await port_of.until("running", 1, seconds=0.2)
        return record

    with serving([]) as server:
        record = asyncio.run(listen(server))
    assert len(record.faults) == 1 and "differ from the 14 spoken alone" in record.faults[0]
    record.status(503, "busy")
    record.status(500, "broken")
    assert record.faults[1:] == ["broken: status 500"]
    assert slope([(second, 100 + second) for second in range(60)]) == pytest.approx(60)


def test_a_server_that_does_not_start_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert serving_http.main(["--streams", "1", "--seconds", "1", "--", "--max-batch", "99"]) == 2
    assert "99" in capsys.readouterr().err
