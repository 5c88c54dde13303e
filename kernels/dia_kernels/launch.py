"""Where every kernel is launched: one narrow place that tests, the codegen report and the traffic meter can listen at."""

from collections.abc import Callable
from typing import Any

Launcher = Callable[..., Any]


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    return kernel[grid](*args, **meta)


_active: Launcher = _launch


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    """Launches `kernel` over `grid`; `meta` are constexpr arguments and compile options."""
    return _active(kernel, grid, *args, **meta)
