"""Pictures come in a light and a dark variant, can be read in both, and are the same for the same data."""

import re
from pathlib import Path
from typing import Any

import pytest

from bench.style import THEMES, Theme, picture, save_figure
from dia_fast.errors import InputError

pytest.importorskip("matplotlib", reason="pictures need matplotlib")


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def draw(axes: Any) -> None:
    axes.plot([1, 2, 3], [1, 4, 9], label="squares")
    axes.legend()


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_all_colours_can_be_told_from_the_background(theme: Theme) -> None:
    assert contrast(theme.text, theme.background) >= 7
    assert min(contrast(colour, theme.background) for colour in theme.cycle) >= 3, "WCAG 2, graphical objects"
    assert len(set(theme.cycle)) == len(theme.cycle) == len(THEMES[0].cycle)


def test_four_files_the_same_every_time_and_without_fonts_to_load(tmp_path: Path) -> None:
    first = save_figure(draw, tmp_path / "a" / "deep", "plot", title="Squares", note="prediction")
    again = save_figure(draw, tmp_path / "b", "plot", title="Squares", note="prediction")
    assert [path.name for path in first] == [
        "plot-light.png", "plot-light.svg", "plot-dark.png", "plot-dark.svg",
    ]  # fmt: skip
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    light, dark = (first[at].read_text(encoding="utf-8") for at in (1, 3))
    assert "<text" not in light and "font-family" not in light, "letters are outlines"
    assert "#ffffff" in light and "#0d1117" in dark
    assert sorted(tmp_path.rglob("*.part")) == []


def test_the_picture_for_a_page_names_files_that_are_written(tmp_path: Path) -> None:
    written = {path.name for path in save_figure(draw, tmp_path, "plot")}
    assert set(re.findall(r'plots/([\w.-]+)"', picture("plot", "squares", "plots"))) <= written


def test_without_matplotlib_it_says_what_to_install(without_matplotlib: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pip install 'dia-fast\[plots\]'"):
        save_figure(draw, tmp_path / "new", "plot")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        save_figure(draw, tmp_path / "file", "plot")
