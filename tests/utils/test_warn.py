"""Warnings blame the caller's line, through any number of wrappers."""

import contextlib
import functools
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dia_fast
from dia_fast.utils.warn import warn

SOURCES = sorted(Path(dia_fast.__file__).parent.rglob("*.py"))


@contextlib.contextmanager
def entered() -> Any:
    yield


def inside(package: str, call: Any) -> Any:
    """The call, from a function of a module of that name."""
    module = types.ModuleType(f"{package}.somewhere")
    exec(compile("def door(call):\n    return call()\n", f"/site/{package}/somewhere.py", "exec"), module.__dict__)
    return functools.partial(module.door, call)


WRAPPERS = {
    "no_grad": lambda call: torch.no_grad()(call),
    "inference_mode": lambda call: torch.inference_mode()(call),
    "contextmanager": lambda call: entered()(call),
    "module": lambda call: inside("dia_fast", call),
    "transformers": lambda call: inside("transformers", call),
}


@given(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=6))
def test_a_warning_blames_the_caller_through_any_wrappers(names: list[str]) -> None:
    door = inside("dia_fast", functools.partial(warn, "so it is", UserWarning))
    for name in names:
        door = WRAPPERS[name](door)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = sys._getframe().f_lineno + 1
        door()
    assert [(item.filename, item.lineno) for item in caught] == [(__file__, line)]


@pytest.mark.parametrize("package", ["dia_fastish", "torchvision", "mine"])
def test_only_whole_names_of_packages_are_passed_over(package: str) -> None:
    with pytest.warns(UserWarning, match="so it is") as record:
        inside(package, inside("dia_fast", functools.partial(warn, "so it is", UserWarning)))()
    assert record[0].filename == f"/site/{package}/somewhere.py"


def test_filters_and_the_once_per_line_rule_hold() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("so it is", UserWarning)
    assert len(caught) == 1
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="so it is"):
        warnings.filterwarnings("error", module=re.escape(__name__))
        warn("so it is", UserWarning)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_other_code_counts_frames(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "stacklevel" not in text and ("warnings.warn(" not in text or path.name == "warn.py")
