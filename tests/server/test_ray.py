"""`dia-fast serve --ray` with two replicas on this machine: one is killed, and no client notices."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dia_fast.cli import app
from dia_fast.errors import InputError
from dia_fast.utils.ray import check_address
from tests.server.serving import LONG, Server, serving

pytest.importorskip("ray", reason="needs the extra ray: make test-ray")
import psutil

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_somebody_else_is_silent(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"{scheme}127.0.0.1:{other.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(InputError, match=f"what answers at {address} is no Ray cluster"):
            check_address(address)
    assert time.monotonic() - start < 15


def test_a_cluster_that_ray_can_start() -> None:
    """As `ray up` checks it, before it asks the cloud for anything."""
    import jsonschema
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    from dia_fast.jobs.ray_pool import PoolOptions

    text = (ROOT / "deploy" / "ray" / "cluster.yaml").read_text()
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    kinds = config["available_node_types"]
    assert kinds["gpu"]["resources"]["GPU"] >= 1 and kinds["gpu"]["resources"]["CPU"] >= PoolOptions("x").cpus_per_actor
    assert not any(kinds[config["head_node_type"]]["resources"].values()), "no engine fits on the head"
    for wrong in ({"max_workers": -1}, {"no_such_entry": 1}):
        with pytest.raises(jsonschema.ValidationError):
            validate_config(config | wrong)
    parser = app.build_parser()
    commands = re.findall(r"^#\s+dia-fast (.*)$", text, re.MULTILINE)
    assert len(commands) == 2 and all(parser.parse_args(command.replace("...", "x").split()) for command in commands)


def test_the_application_of_the_manifest(tmp_path: Path) -> None:
    import yaml

    manifest = yaml.safe_load((ROOT / "deploy" / "ray" / "rayservice.yaml").read_text())
    [app] = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    args = app["args"] | {"model": "demo", "cpus_per_replica": 1, "max_replicas": 1, "no_auth": True, "threads": 1}
    args["voices"] = str(tmp_path)
    module, function = app["import_path"].split(":")
    program = f"""
import sys, urllib.request, ray
from ray import serve
from {module} import {function}
ray.init(address="local", include_dashboard=False, log_to_driver=False)
serve.start(http_options={{"port": int(sys.argv[1])}})
serve.run({function}({args!r}), name={app["name"]!r}, route_prefix={app["route_prefix"]!r})
print(urllib.request.urlopen(f"http://127.0.0.1:{{sys.argv[1]}}/ready").read().decode())
try:
    {function}({{"no_such": 1}})
except Exception as error:
    print(type(error).__name__, error)
serve.shutdown()
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = subprocess.run([sys.executable, "-c", program, str(port)], capture_output=True, text=True, timeout=300)
    assert '{"status":"ready"}' in found.stdout, found.stderr
    assert "InputError these are not options of dia-fast serve: {'no_such': 1}" in found.stdout
