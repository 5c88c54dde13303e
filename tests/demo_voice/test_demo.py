"""`make demo` as a user runs it: a process of its own, an empty folder, nothing downloaded."""

import os
import subprocess
import sys
from pathlib import Path

import soundfile

ROOT = Path(__file__).resolve().parents[2]


def run_demo(folder: Path) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    finished = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--out", folder],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
    return finished.stdout


def test_demo_speaks_the_same_twice_and_says_with_what(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    said = run_demo(folder)
    path = folder / "dialogue.wav"
    assert str(path) in said
    assert "demo voice" in said and "nari-labs/Dia-1.6B-0626" in said
    samples, rate = soundfile.read(path)
    assert rate == 16_000
    assert len(samples) > 2 * rate
    assert samples.std() > 0.01

    # Into the same folder again: what lies there is replaced.
    first = path.read_bytes()
    run_demo(folder)
    assert path.read_bytes() == first
