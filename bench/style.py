"""The look of all reports' pictures: `dia_fast.diagnostics.plotting`, which `dia-fast plan --plots` uses too.

    save_figure(lambda axes: axes.plot([1, 2], [3, 4]), Path("out"), "name", title="What it shows", note="machine")

writes `name-light.png`, `name-light.svg`, `name-dark.png` and `name-dark.svg`.
"""

from dia_fast.diagnostics.plotting import DARK, LIGHT, THEMES, Draw, Theme, picture, save_figure

__all__ = ["DARK", "LIGHT", "THEMES", "Draw", "Theme", "picture", "save_figure"]
