"""Draw the pictures of the README and the documentation, and speak their sample.

    python -m bench.readme [--out docs/assets]

Writes `speech-light.png` and `speech-dark.png` (waveform and spectrogram of the demo voice), `speech.mp3` (what they
show), and `speed-light.png` and `speed-dark.png` (decode steps that were measured, `bench/measured.json`).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.style import save_figure
from dia_fast import Audio, Dia
from dia_fast.errors import DiaFastError

TEXT = "[S1] Good morning, the red book is in the kitchen. [S2] Thank you, please close the green window."
SEED = 7
MEASURED = Path(__file__).resolve().parent / "measured.json"


def speak() -> Audio:
    """Return the sample: the demo voice, on the CPU, with one thread and a fixed seed."""
    torch.set_num_threads(1)
    with Dia.from_pretrained("demo", device="cpu") as dia:
        audio = dia.generate(TEXT, seed=SEED)
    assert isinstance(audio, Audio)
    return audio


def draw_speech(audio: Audio, folder: Path) -> list[Path]:
    """Draw a spectrogram with the waveform below it."""

    def draw(axes: Any) -> None:
        dark = np.mean(axes.figure.get_facecolor()[:3]) < 0.5
        window = 512
        steps = np.lib.stride_tricks.sliding_window_view(audio.samples, window)[::64] * np.hanning(window)
        power = 20 * np.log10(np.abs(np.fft.rfft(steps, axis=1)) + 1e-4).T
        top = power.max()
        axes.imshow(
            power, origin="lower", aspect="auto", extent=(0, audio.duration, 0, audio.sample_rate / 2000),
            cmap="magma" if dark else "Blues", vmin=top - 70, vmax=top, interpolation="bilinear",
        )  # fmt: skip
        times = np.arange(len(audio.samples)) / audio.sample_rate
        axes.plot(times, -1.5 + 1.4 * audio.samples / np.abs(audio.samples).max(), linewidth=0.4, color="C0")
        axes.set(xlabel="seconds", ylabel="kHz", ylim=(-3, audio.sample_rate / 2000), xlim=(0, audio.duration))
        axes.set_yticks(range(0, audio.sample_rate // 2000 + 1, 2))
        axes.grid(False)

    return save_figure(draw, folder, "speech", title=TEXT, size=(9.0, 3.2))


def draw_speed(folder: Path) -> list[Path]:
    """Draw the time of a decode step as bars, and the time that reading the weights takes as a line."""
    found = json.loads(MEASURED.read_text())["h200"]
    bars = found["ms"]

    def draw(axes: Any) -> None:
        colours = ["C0" if item["ours"] else "C5" for item in bars]
        axes.barh(range(len(bars)), [item["ms"] for item in bars], color=colours, height=0.6)
        for place, item in enumerate(bars):
            label = f"{item['ms']:.2f} ms = {1000 / item['ms'] / 86.13:.1f} x realtime"
            inside = item["ms"] > 10
            axes.text(
                item["ms"] - 0.2 if inside else item["ms"] + 0.2, place, label, va="center",
                ha="right" if inside else "left",
                color=axes.get_facecolor() if inside else axes.xaxis.label.get_color(),
            )  # fmt: skip
        axes.axvline(found["floor_ms"], color="C1", linestyle=":", label=f"{found['floor_ms']} ms: {found['floor']}")
        axes.set(xlabel="ms per decode step (shorter is better)")
        axes.set_yticks(range(len(bars)), [item["name"] for item in bars])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")

    return save_figure(draw, folder, "speed", title="One decode step", note=found["machine"], size=(9.0, 2.8))


def _smaller(source: Path, path: Path) -> Path:
    """Write a PNG with a palette of 256 colours: a third of the bytes, and no difference that shows."""
    from PIL import Image  # comes with matplotlib

    with Image.open(source) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="readme", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/assets"), help="folder (default: %(default)s)")
    out = parser.parse_args(arguments).out
    try:
        audio = speak()
        with tempfile.TemporaryDirectory() as scratch:
            drawn = [*draw_speech(audio, Path(scratch)), *draw_speed(Path(scratch))]
            out.mkdir(parents=True, exist_ok=True)
            paths = [_smaller(path, out / path.name) for path in drawn if path.suffix == ".png"]
        paths.append(audio.save(out / "speech.mp3"))
    except DiaFastError as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
