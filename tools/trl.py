"""Prepare a Python with TRL in `.venv-trl`, for `benchmarks/learner.py`: `make trl`. Run by the checkout's own Python.

TRL takes other versions of transformers than vLLM, so it lives in a virtual environment of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from locked_venv import LockedVenv

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "trl.txt"
FOLDER = ROOT / ".venv-trl"
VERSION = "1.16.0"
FITTING = ("3.11",)


def main() -> int:
    """0 when it is prepared, 1 with a one-line error, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=f"Prepare a virtual environment with TRL {VERSION}.")
    parser.add_argument("--python", default="", help="a Python 3.11 (default: the checkout's own)")
    environment = LockedVenv(
        name="trl",
        package="TRL",
        version=VERSION,
        folder=FOLDER,
        lock=LOCK,
        probe="import trl, trl.trainer.grpo_trainer; print(trl.__version__)",
        pythons=FITTING,
        needed_gb=2,
        variable="TRL_PYTHON",
    )
    return environment.make(parser.parse_args().python)


if __name__ == "__main__":
    sys.exit(main())
