"""`python -m raygym`: the command line, for `ray job submit`, where no console script is installed."""

import sys

from raygym.cli import main

if __name__ == "__main__":
    sys.exit(main())
