"""`python -m fastcifar`, which does what `fastcifar` does."""

import sys

from fastcifar.cli import main

if __name__ == "__main__":
    sys.exit(main())
