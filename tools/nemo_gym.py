"""Prepare a Python for NeMo Gym, in raygym's cache directory: `make nemo-gym`. Run by the checkout's own Python.

NeMo Gym asks for another Python than raygym, so its servers live in a virtual environment of their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from locked_venv import LockedVenv

from raygym.nemo_gym.interpreter import VERSION, prepared_folder

LOCK = Path(__file__).resolve().parent.parent / "requirements" / "nemo-gym.txt"
FITTING = ("3.13", "3.12")


def main() -> int:
    """0 when it is prepared, 1 with a one-line error, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=f"Prepare a virtual environment with NeMo Gym {VERSION}.")
    parser.add_argument("--python", default="", help=f"a Python {' or '.join(FITTING)} (default: searched for)")
    parser.add_argument("--if-possible", action="store_true", help="where it cannot be: say so and succeed")
    options = parser.parse_args()
    environment = LockedVenv(
        name="nemo-gym",
        package="NeMo Gym",
        version=VERSION,
        folder=prepared_folder(),
        lock=LOCK,
        probe="import importlib.metadata as m, nemo_gym.global_config; print(m.version('nemo-gym'))",
        pythons=FITTING,
        needed_gb=3,
        variable="NEMO_GYM_PYTHON",
        pip_options=("--ignore-requires-python",),
    )
    return environment.make(options.python, if_possible=options.if_possible)


if __name__ == "__main__":
    sys.exit(main())
