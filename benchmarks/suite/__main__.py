"""`python benchmarks/suite ...`."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder there, and what is needed is the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.exit(importlib.import_module("suite.command").main())
