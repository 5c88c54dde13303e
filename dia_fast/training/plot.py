"""The log of a run as a picture."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dia_fast.utils.files import replacing


def plot_losses(lines: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw loss over steps, in training and held out, to a PNG file; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = list(lines)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per code, nats")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True
