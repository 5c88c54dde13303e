"""Run a program that was written for the original `dia` package on dia-fast, without a change.

python -m dia_fast.run server.py --port 8003       # instead of: python server.py --port 8003
python -m dia_fast.run -m program.main             # instead of: python -m program.main
"""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    from dia_fast.errors import DiaFastError
    from dia_fast.integrations import original

    parser = argparse.ArgumentParser(prog="python -m dia_fast.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--also", action="append", default=[], metavar="MODULE", help="one more module that holds Dia")
    parser.add_argument("--only-dia", action="store_true", help="leave copies of the package under other names alone")
    parser.add_argument("--quirks", action="store_true", help="repeat the original's off-by-one, for the same tokens")
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module")
    parser.add_argument("program", metavar="PROGRAM", help="a script, or with -m a module")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="what the program is given")
    given = parser.parse_args(arguments)
    try:
        original.install(also=given.also, discover=not given.only_dia, quirks=given.quirks)
    except DiaFastError as error:
        print(f"dia_fast.run: {error}", file=sys.stderr)
        return 2
    if not given.module and not os.path.isfile(given.program):
        print(f"dia_fast.run: {given.program}: no such script; a module is run with -m", file=sys.stderr)
        return 2
    sys.argv = [given.program, *given.options]
    # Where Python looks first: as it would be if the program had been started by itself.
    sys.path[0] = os.getcwd() if given.module else os.path.dirname(os.path.abspath(given.program))
    if given.module:
        runpy.run_module(given.program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(given.program, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
