"""A batch that is killed, anywhere, and started again: the same bytes as if nothing had happened, and nothing twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.front import make_codec, make_model, tree

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    make_model(tmp_path / "model")
    make_codec(tmp_path / "codec")
    items = [{"id": f"item-{number}", "text": f"[S1] Number {number}. [S2] Yes."} for number in range(7)]
    items[3]["text"] = ""  # one that fails
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    found = subprocess.run(
        [sys.executable, "-m", "tests.helpers.crashing", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["undisturbed"] == 1, "one item fails"
    expected = tree(tmp_path / "undisturbed")
    assert len(expected) == 7
    stopped = {0: {-9}, 1: {77}, 2: {130}}
    for number, runs in enumerate(result["rounds"]):
        assert tree(tmp_path / f"out-{number}") == expected
        assert len(runs) > 2 and runs[-1][1] == 1, "it was never stopped, or never ended"
        rewritten = 0
        for (kind, status, before), (_, _, after) in zip(runs, runs[1:], strict=False):
            assert status in stopped[kind]
            for name in before.keys() - {"manifest.jsonl"}:
                assert before[name][0] == runs[-1][2][name][0], f"{name} was half-written"
                rewritten += before[name][1] != after[name][1]
        assert rewritten <= len(runs) - 1, "a run that was stopped costs no more than the one file it was at"
