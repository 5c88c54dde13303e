"""The bars on standard error: what they expect, and how they end."""

import re

import pytest

from dia_fast.generation.inputs import expected_steps
from dia_fast.model.config import DiaConfig
from dia_fast.text.tokenizer import spoken_seconds
from dia_fast.utils.progress import ItemBar, StepBar


def last_line(shown: str) -> str:
    return shown.rstrip("\n").rsplit("\r", 1)[-1]


@pytest.mark.parametrize("steps", [8, 100, 130])
def test_it_ends_full_whatever_was_expected(steps: int, capfd: pytest.CaptureFixture[str]) -> None:
    """The model may end at 8 % of what its text seemed to need, or go on."""
    with StepBar(100, 86.0) as bar:
        for step in range(1, steps + 1):
            bar(step)
    line = last_line(capfd.readouterr().err)
    assert "100%" in line and f"{steps}/{steps}" in line and "x realtime" in line


def test_a_longer_run_moves_the_end_and_never_passes_it(capfd: pytest.CaptureFixture[str]) -> None:
    with StepBar(10, 86.0) as bar:
        for step in range(1, 31):
            bar(step)
            bar._bar.refresh()
    shares = [int(share) for share in re.findall(r"(\d+)%", capfd.readouterr().err)]
    assert max(shares) == 100 and shares[-1] == 100


def test_an_error_leaves_it_where_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), StepBar(100, 86.0) as bar:
        bar(8)
        raise KeyboardInterrupt
    assert "8/100" in last_line(capfd.readouterr().err)


def test_what_is_expected_follows_the_text_and_not_the_limit() -> None:
    config = DiaConfig()
    text = "[S1] Please open the red door. [S2] Yes, thank you."
    expected = expected_steps(config, spoken_seconds(text), 3072)
    assert 2 * 86 < expected < 10 * 86, "the text takes some seconds, the limit is 36"
    assert expected_steps(config, 60.0, 500) == 501


def test_hidden_bars_count_and_show_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with StepBar(10, 86.0, hidden=True) as bar, ItemBar(3, 1, 86.0, hidden=True) as items:
        bar(4)
        items.stepped(2)
        items.ended()
    assert bar.steps == 4 and capfd.readouterr().err == ""


def test_remarks_stand_above_the_bar_of_items(capfd: pytest.CaptureFixture[str]) -> None:
    with ItemBar(2, 0, 86.0) as bar:
        bar.stepped(1)
        bar.ended("the first failed")
        bar.ended()
    shown = capfd.readouterr().err
    assert "the first failed\n" in shown
