"""The command line: `app` has the parser, `process` streams and signals; then one module per command.

Nothing is imported here, so that Ctrl-C is understood from the first moment.
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argparse itself exits with 2 on a wrong option."""
    try:
        from dia_fast.cli.process import prepared

        with prepared():
            from dia_fast.cli.app import run

            return run(argv)
    except KeyboardInterrupt:
        import os

        os.write(2, b"dia-fast: interrupted\n")
        return 130
