"""Checkpoints from the Hub, served by a stand-in on this machine to a process with an empty cache."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.tools.tiny_models import make_original_checkpoint, tiny_config
from dia_fast.checkpoint.saving import save_pretrained
from dia_fast.model.fused_weights import fused_shapes

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories of one commit and one branch, main; notes the files that were asked for."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.fetched: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        info = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if info else parts
        folder = self.server.repositories.get(f"{owner}/{name}")
        if folder is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif info:
            files = [{"rfilename": path.name} for path in folder.iterdir()]
            self.answer(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": files}).encode())
        else:
            content = (folder / rest[2]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            if self.command == "GET":
                self.server.fetched.append(rest[2])
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    weights = {name: torch.rand(shape) for name, shape in fused_shapes(tiny_config()).items()}
    save_pretrained(root / "new", tiny_config(), weights, max_shard_bytes=10**6)
    (root / "new" / "dia-v1.pth").write_bytes(b"another form of the weights, not needed")
    make_original_checkpoint(root / "original", file="pytorch_model.bin")
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))
    (root / "other" / "pytorch_model.bin").write_bytes(b"gigabytes")
    (root / "empty").mkdir()
    server = Hub({f"nari/{path.name}": path for path in root.iterdir()})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, sys
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.errors import CheckpointError
for arguments in json.loads(sys.argv[1]):
    try:
        checkpoint = open_checkpoint(arguments.pop("name"), **arguments)
        print(json.dumps([checkpoint.layout, float(checkpoint.load()["decoder.norm"].sum())]))
    except CheckpointError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def run(address: str, home: Path, *calls: dict[str, Any]) -> list[list[Any]]:
    """Open checkpoints in a process of its own, which reads the address of the Hub when it starts."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_what_is_needed_is_downloaded_and_kept(hub: Hub, tmp_path: Path) -> None:
    hub.fetched.clear()
    first, again, original, other, no_config, unknown, branch = run(
        hub.address,
        tmp_path,
        {"name": "nari/new"},
        {"name": "nari/new", "local_files_only": True},
        {"name": "nari/original", "revision": "main"},
        {"name": "nari/other"},
        {"name": "nari/empty"},
        {"name": "nari/nothing"},
        {"name": "nari/new", "revision": "v2"},
    )
    assert first[0] == "transformers"
    assert again == first
    assert original[0] == "original"
    assert other[0] == "CheckpointError" and "bert" in other[1], "its weights are not asked for"
    assert "the Hub repository nari/empty has no config.json" in no_config[1]
    assert "nari/nothing is neither a local folder nor a repository of the Hub that you may read" in unknown[1]
    assert "the Hub repository nari/new has no revision 'v2'" in branch[1]
    weights = sorted(name for name in hub.fetched if name.endswith((".safetensors", ".bin", ".pth")))
    assert weights == [*(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)), "pytorch_model.bin"]

    nowhere = "http://127.0.0.1:1"
    cached, refused, absent = run(
        nowhere,
        tmp_path,
        {"name": "nari/new"},
        {"name": "nari/nothing", "local_files_only": True},
        {"name": "nari/nothing"},
    )
    assert cached == first
    assert "nor in the cache of the Hub, and it may not be downloaded (local_files_only)" in refused[1]
    assert "nor in the cache of the Hub, and the Hub cannot be reached" in absent[1]
