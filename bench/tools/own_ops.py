"""`--ops module:name`: kernels of one's own in the place of shipped ones, for the tools that look at kernels."""

import argparse
from types import ModuleType

from dia_fast.errors import InputError
from dia_kernels import triton as kernels
from dia_kernels import with_ops


def add_ops_option(parser: argparse.ArgumentParser) -> None:
    """Add `--ops`."""
    parser.add_argument("--ops", metavar="MODULE[:NAME]", help="ops of your own in the place of the shipped ones")


def chosen_ops(place: str | None) -> ModuleType:
    """Return the Triton op set with what `--ops` names in it. Raises InputError."""
    try:
        return kernels if place is None else with_ops(kernels, place)
    except ValueError as error:
        raise InputError(str(error)) from error
