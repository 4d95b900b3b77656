"""The Python that NeMo Gym lives in: not raygym's own, since the two ask for different ones."""

from __future__ import annotations

import os
from pathlib import Path

from raygym.models import cache_dir
from raygym.nemo_gym.config import NemoGymError, NemoGymMissing

VERSION = "0.7.0"
"""The NeMo Gym that `make nemo-gym` installs and that the tests run against."""


def prepared_folder() -> Path:
    """Where `make nemo-gym` puts the virtual environment. It appears there whole or not at all."""
    return cache_dir() / "nemo-gym" / VERSION


def find_interpreter(configured: str) -> str:
    """The configured Python, or the prepared one.

    Raises:
        NemoGymError: there is none; the text says how to get it.
    """
    path = Path(configured).expanduser() if configured else prepared_folder() / "bin" / "python"
    if path.is_file() and os.access(path, os.X_OK):
        # Not resolved: a virtual environment's python is a link, and following it would leave the environment.
        return str(path.absolute())
    if configured:
        raise NemoGymError(f"interpreter: {configured!r} is no executable file; expected a Python with nemo-gym")
    raise NemoGymMissing(
        f"interpreter: NeMo Gym {VERSION} is not prepared here; run `make nemo-gym` once, or name a Python that has it"
    )


def clean_environment() -> dict[str, str]:
    """This process's environment without what would show raygym's packages to another Python."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("RAY_")}
