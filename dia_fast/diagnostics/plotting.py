"""Pictures for reports: one drawing, saved for light and for dark pages, as PNG and as SVG.

Needs matplotlib, which the base install lacks. Fonts are those that come with it, drawn as outlines: a file looks the
same everywhere, and the same data gives the same bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dia_fast.errors import InputError
from dia_fast.utils.files import replacing

Draw = Callable[[Any], object]
"""Draws on the matplotlib axes it is given; colours "C0" to "C5", text and grid are those of the theme."""


@dataclass(frozen=True)
class Theme:
    """Colours of one variant. cycle: the same meanings in every theme, each at least 3:1 against the background."""

    name: str
    background: str
    text: str
    grid: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#d0d7de", ("#0072b2", "#c95500", "#00805d", "#a8447a", "#8a5d00", "#6e7781")
)
DARK = Theme(
    "dark", "#0d1117", "#e6edf3", "#3d444d", ("#58a6ff", "#ff9e64", "#3fb98f", "#e58fc0", "#e3b341", "#a0a8b2")
)
THEMES = (LIGHT, DARK)


def require_matplotlib() -> None:
    """Raise InputError, saying what to install, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"plots need matplotlib ({error}); install it with: pip install 'dia-fast[plots]'") from None


def save_figure(
    draw: Draw, folder: Path, name: str, *, title: str = "", note: str = "", size: tuple[float, float] = (8.0, 4.5)
) -> list[Path]:
    """Draw once per theme and write `NAME-light.png`, `NAME-light.svg`, `NAME-dark.png` and `NAME-dark.svg`.

    folder: made if it is not there. title: above the axes; note: small, below them, for what must not get lost when the
    picture is passed on alone. size: inches; PNG files have 144 dots per inch. Returns the paths. Raises InputError if
    matplotlib is missing or a file cannot be written.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    paths = []
    for theme in THEMES:
        with rc_context(_rc_params(theme)):
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots()
            draw(axes)
            if title:
                axes.set_title(title)
            if note:
                figure.supxlabel(note, fontsize=8, alpha=0.85)
            for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{name}-{theme.name}.{kind}"
                with replacing(path) as temporary:
                    figure.savefig(temporary, format=kind, dpi=144, metadata=facts)
                figure.set_layout_engine("none")  # laid out by now, which took half of the time
                paths.append(path)
    return paths


def picture(name: str, alt: str, folder: str = ".") -> str:
    """HTML for a Markdown page: the SVG that suits the reader's theme."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.svg">'
        f'<img alt="{alt}" src="{folder}/{name}-light.svg"></picture>'
    )


def _rc_params(theme: Theme) -> dict[str, Any]:
    from cycler import cycler  # comes with matplotlib

    ink: Sequence[str] = (
        "text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color",
    )  # fmt: skip
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    return {
        **dict.fromkeys(ink, theme.text),
        **dict.fromkeys(paper, theme.background),
        "legend.edgecolor": theme.grid,
        "axes.prop_cycle": cycler(color=theme.cycle),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "svg.fonttype": "path",
        "svg.hashsalt": "dia-fast",
    }
