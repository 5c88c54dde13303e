"""Warnings that point at the line of the caller's own program."""

import sys
import warnings

# Packages whose frames may lie between the caller and a warning: this one, and those that call it back or wrap it.
# `torch.no_grad` as a decorator adds one frame in some versions of torch and two in others.
_BETWEEN = frozenset(
    {"accelerate", "contextlib", "dia_fast", "dia_kernels", "functools", "peft", "torch", "transformers"}
)


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning about the innermost frame that is neither this package's nor a wrapper's.

    `warnings.warn` counts frames, and the count changes with the versions of Python and torch; its
    `skip_file_prefixes` needs Python 3.12.

    Args:
        message: the text of the warning.
        category: its class.
    """
    frame = sys._getframe(1)
    while str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
