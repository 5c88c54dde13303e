"""`python -m dia_fast` is the command line."""

from dia_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
