"""Paths on the command line: every one is looked up before a command begins.

An argument that takes a path, or a name that may be one, has `type=path`. `check` finds them by that.
"""

import argparse
import os


def path(text: str) -> str:
    """Mark an argument as a path. The text stays as it is until `check`."""
    return text


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Expand `~` in every path of a command's arguments, and refuse those that the system cannot look up.

    Args:
        parser: Of the command.
        args: What it has parsed; changed in place.

    Raises:
        InputError: Too long, empty, with a null character, or behind a folder that may not be read.
    """
    from dia_fast.utils.files import checked_path

    for action in parser._actions:
        text = getattr(args, action.dest, None)
        if action.type is path and text is not None:
            name = max(action.option_strings, key=len) if action.option_strings else str(action.metavar)
            checked_path(text, name)
            setattr(args, action.dest, os.path.expanduser(text))  # and no more: ./name is no Hub repository
