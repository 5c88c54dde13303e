"""Makes the demo voice from nothing: speech, codec, model, and the folder that the package ships.

    python -m examples.demo_voice.build [FOLDER] [--output dia_fast/demo_voice]

Steps whose results lie in FOLDER already are not done again; the training of the model goes on where it was stopped.
Where torch sees a GPU the model is trained there, three times as long in much less time.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dia_fast.audio.codec import load_codec
from dia_fast.training import TrainOptions
from examples.demo_voice import on_gpu
from examples.demo_voice.sentences import vocabulary

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 20_000_000  # bytes, of everything that is shipped

TRAINING: dict[str, Any] = {
    "beta2": 0.98,
    "drop_text": 0.1,
    "channel_weights": (3, 2, 1.5, 1, 1, 1, 1, 1, 1),
    "dtype": "bf16",
    "eval_share": 0.02,
    "seed": 1,
}
# What made the weights that are shipped: 22 times all recordings, in a minute or two.
ON_GPU: dict[str, Any] = {
    "steps": 6841, "batch_size": 32, "learning_rate": 2e-3, "warmup": 300, "final_share": 0.01,
    "weight_decay": 0.1, "drop_codes": 0.25,
}  # fmt: skip
# What two cores can do in the time that speech, codec and codes leave of three hours: 7 times all recordings.
ON_CPU: dict[str, Any] = {
    "steps": 9200, "batch_size": 8, "learning_rate": 1e-3, "warmup": 200, "final_share": 0.02,
    "weight_decay": 0.05, "drop_codes": 0.1, "eval_every": 400, "save_every": 400,
}  # fmt: skip


def python(*arguments: str | Path) -> None:
    """Run a module in a process of its own; stop everything if it fails."""
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, cwd=ROOT)


def speech(folder: Path) -> None:
    """Training recordings: short ones of one or two turns, and turns of two sentences; with many numbers."""
    module, numbers = "examples.demo_voice.speech", ("--numbers", "0.55")
    python(module, folder / "short", "--count", "7500", "--seed", "1", *numbers)
    python(module, folder / "long", "--count", "2500", "--seed", "3", "--turns", "1", "--sentences", "2", *numbers)
    entries = [
        json.dumps({"audio": f"{part}/{entry['audio']}", "text": entry["text"]})
        for part in ("short", "long")
        for entry in map(json.loads, (folder / part / "recordings.jsonl").read_text(encoding="utf-8").splitlines())
    ]
    (folder / "recordings.jsonl").write_text("\n".join(entries) + "\n", encoding="utf-8")


def train(work: Path) -> None:
    """On a GPU in one go; on a CPU by `dia-fast train`, or by its continuation."""
    run, places = work / "run", {"model": str(work / "untrained"), "codec": str(work / "codec")}
    data = str(work / "speech" / "recordings.jsonl")
    if torch.cuda.is_available():
        options = TrainOptions.from_dict({"data": data} | places | TRAINING | ON_GPU)
        on_gpu.train(options, work / "codes", run / "model", torch.device("cuda"))
    elif (run / "run.json").is_file():
        python("dia_fast", "train", "-o", run, "--resume")
    else:
        given = []
        for name, value in (places | TRAINING | ON_CPU).items():
            numbers = value if isinstance(value, tuple) else (value,)
            given += [f"--{name.replace('_', '-')}", ",".join(map(str, numbers))]
        python("dia_fast", "train", data, "-o", run, "--codes", work / "codes", *given)


def pack(work: Path, output: Path) -> None:
    """Everything that is shipped, but for the model card: weights in 16 bits, and the words."""
    for file in (work / "run" / "model").iterdir():
        shutil.copyfile(file, output / file.name)
    shutil.rmtree(output / "codec", ignore_errors=True)
    load_codec(work / "codec", dtype=torch.float16).save_pretrained(output / "codec")
    (output / "vocabulary.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if size > LARGEST:
        sys.exit(f"{output} has {size} bytes, more than {LARGEST}")
    print(f"{output}: {size / 1e6:.1f} MB")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "examples" / "demo_voice" / "build")
    parser.add_argument("--output", type=Path, default=ROOT / "dia_fast" / "demo_voice")
    options = parser.parse_args()
    work: Path = options.folder.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[str, Path, Callable[[], None]]] = [
        ("speech", work / "speech" / "recordings.jsonl", lambda: speech(work / "speech")),
        ("codec", work / "codec.done", lambda: _codec(work)),
        ("untrained model", work / "untrained", lambda: python("examples.demo_voice.model", work / "untrained")),
        ("model", work / "run" / "model", lambda: train(work)),
    ]
    for name, result, make in steps:
        if result.exists():
            print(f"{name}: there already")
            continue
        start = time.monotonic()
        make()
        print(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    pack(work, options.output.resolve())


def _codec(work: Path) -> None:
    python("examples.demo_voice.codec", work / "speech" / "short", work / "codec")
    (work / "codec.done").touch()


if __name__ == "__main__":
    main()
