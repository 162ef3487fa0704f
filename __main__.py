"""`python -m havoc_core` is the command `havoc`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
