"""Memory that was freed, given back to the system."""

import ctypes
import functools
from typing import Any


def give_back() -> None:
    """Return what malloc holds without use: freed blocks between others would count as resident for ever.

    glibc alone has a call for it; elsewhere nothing is done.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    """malloc_trim of the C library, or None."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows, which has no library of no name
        return None
