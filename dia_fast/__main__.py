"""`python -m dia_fast` is the command line."""

import sys

from dia_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
