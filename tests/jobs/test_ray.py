"""`dia-fast batch --ray` on a cluster of this machine: killed anywhere, it ends with the bytes of a run without Ray."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.front import make_codec, make_model, tree

pytest.importorskip("ray", reason="needs the extra ray: make test-ray")
import psutil

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
ITEMS = 60
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # of Ray; where their cluster was killed they end after 60 s


def started(home: Path, folder: str, *more: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "dia_fast",
        "batch",
        str(home / "in.jsonl"),
        str(home / folder),
        "--batch-size",
        "2",
    ]
    command += ["--model", str(home / "model"), "--codec", str(home / "codec"), "--max-new-tokens", "60", *more]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def done(folder: Path) -> int:
    """Count the items that the manifest calls done."""
    try:
        lines = (folder / "manifest.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum('"status": "done"' in line for line in lines)


def wait_for(folder: Path, count: int, process: "subprocess.Popen[str]") -> None:
    while done(folder) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def of_ray(after: float) -> list[psutil.Process]:
    """Processes of Ray that began after a moment, zombies aside."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "create_time", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        is_ray = "raylet" in words or "gcs_server" in words or words.startswith("ray::")
        if is_ray and process.info["create_time"] >= after and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def title(process: psutil.Process) -> str:
    """Command line of one of `of_ray`, as it was then: the process may have ended."""
    return " ".join(process.info["cmdline"] or [])


def speaking(after: float) -> list[psutil.Process]:
    """Actors that have items in hand."""
    return [process for process in of_ray(after) if "_Speaker.speak" in title(process)]


def left(after: float, but: tuple[str, ...] = (), seconds: float = 30) -> list[str]:
    """Processes of Ray that are still there after so long, without those of the titles `but`."""

    def found() -> list[psutil.Process]:
        return [process for process in of_ray(after) if not title(process).startswith(but or "\0")]

    end = time.monotonic() + seconds
    while (there := found()) and time.monotonic() < end:
        time.sleep(0.2)
    return [f"{process.info['status']} {title(process)[:200]}" for process in there]


@pytest.fixture(scope="module")
def begun() -> float:
    """The moment before the first cluster of these tests."""
    return time.time()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("ray")
    make_model(folder / "model")
    make_codec(folder / "codec")
    items = [{"id": f"i{number}", "text": f"[S1] Number {number}. [S2] Yes."} for number in range(ITEMS)]
    (folder / "in.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    alone = started(folder, "alone")
    said = alone.communicate()[1]
    assert alone.returncode == 0, said
    return folder


def test_an_actor_and_then_the_driver_are_killed(home: Path, begun: float) -> None:
    first = started(home, "out", "--ray", "local", "--actors", "2")
    wait_for(home / "out", 5, first)
    while len(actors := speaking(begun)) < 2:  # the other one may still be loading
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.1)
    assert len(actors) == 2
    actors[0].send_signal(signal.SIGKILL)
    wait_for(home / "out", done(home / "out") + 10, first)
    first.kill()
    assert "was lost with" in (first.communicate()[1] or "")
    assert left(begun, AGENTS) == [], "Ray outlives a driver that was killed"
    before = {path.name: path.stat().st_mtime_ns for path in (home / "out").glob("*.wav")}
    assert 15 <= len(before) < ITEMS
    second = started(home, "out", "--ray", "local", "--actors", "1")
    said = second.communicate()[1]
    assert second.returncode == 0, said
    assert f"actor 1: {ITEMS - len(before)} items" in said or f"actor 1: {ITEMS - len(before) + 1} items" in said
    assert tree(home / "out") == tree(home / "alone")
    again = [name for name, stamp in before.items() if (home / "out" / name).stat().st_mtime_ns != stamp]
    assert len(again) <= 1, "only the item whose line had not been written is done again"


def test_an_interruption_ends_the_cluster(home: Path) -> None:
    begun = time.time()
    process = started(home, "interrupted", "--ray", "local", "--actors", "1")
    wait_for(home / "interrupted", 3, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on from here" in said
    assert "Traceback" not in said
    assert left(begun) == []


def test_a_model_that_cannot_be_loaded_is_told(home: Path) -> None:
    begun = time.time()
    (home / "damaged").mkdir()
    for name in ("config.json", "model.safetensors"):
        (home / "damaged" / name).write_bytes((home / "model" / name).read_bytes())
    (home / "damaged" / "model.safetensors").write_bytes(b"nothing")
    process = started(home, "none", "--model", str(home / "damaged"), "--ray", "local")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "dia-fast: error:" in said and "safetensors" in said
    assert left(begun) == []


def kill_all_of(home: Path, after: float) -> None:
    """Kill the processes that have this home; those of Ray that write a title lose their environment."""
    titled = of_ray(after)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process in titled or process.environ().get("HOME") == str(home):
                process.kill()


def test_a_cluster_with_a_token(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("0123456789abcdef" * 2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    connect = "import sys; from dia_fast.utils.ray import cluster\nwith cluster(sys.argv[1]): print('connected')"

    def run(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", *words]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=120)

    ray = "from ray.scripts.scripts import main; main()"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    begun = time.time()
    head = run(
        ray, "start", "--head", "--port", address.rpartition(":")[2], "--num-cpus=1", "--include-dashboard=false"
    )
    assert head.returncode == 0, head.stderr
    try:
        for words, more in ((address, {"RAY_AUTH_MODE": "token"}), ("auto", {})):
            found = run(connect, words, **more)
            assert found.stdout == "connected\n", found.stderr
        assert f"the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token" in run(connect, address).stderr
    finally:
        kill_all_of(home, begun)


def test_no_process_of_ray_is_left(begun: float) -> None:
    assert left(begun, seconds=100) == []
