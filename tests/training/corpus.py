"""A tiny model, a tiny codec and recordings of noise to train on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from tests.helpers.front import make_codec, make_model

RATE = 44_100
# Quick steps, evaluated and saved often; warm-up and the end of the cosine within them.
QUICK: dict[str, Any] = {
    "steps": 12, "batch_size": 2, "accumulate": 2, "warmup": 3, "learning_rate": 1e-2, "eval_every": 5,
    "save_every": 4, "eval_share": 0.2, "drop_text": 0.3,
}  # fmt: skip


def make_home(folder: Path, recordings: int = 7) -> Path:
    """A folder with a `model`, a `codec` and a folder `data` of so many recordings, 0.05 to 0.2 seconds each."""
    torch.manual_seed(1)
    make_model(folder / "model")
    make_codec(folder / "codec")
    make_data(folder / "data", recordings)
    return folder


def make_data(folder: Path, recordings: int) -> Path:
    noise = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(recordings):
        sound = noise.normal(size=int(RATE * noise.uniform(0.05, 0.2)), scale=0.1)
        soundfile.write(folder / f"{number}.wav", sound.astype(np.float32), RATE)
        (folder / f"{number}.txt").write_text(f"[S1] Number {number}. [S2] So it is.\n", encoding="utf-8")
    return folder


def given(home: Path, **options: Any) -> dict[str, Any]:
    """Settings of a quick run in `home`."""
    return {"model": home / "model", "codec": home / "codec", "data": home / "data"} | QUICK | options


def log_of(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without the time that steps took."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
