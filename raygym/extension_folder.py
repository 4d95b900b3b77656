"""Where torch compiles DeepSpeed's extensions: a folder for each environment, instead of one for all of a user's."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

VARIABLE = "TORCH_EXTENSIONS_DIR"


def own_folder() -> Path:
    """`TORCH_EXTENSIONS_DIR` where the user has chosen one, else this environment's own.

    Raises:
        PackageNotFoundError: torch or deepspeed is not installed.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    what = f"{sys.prefix} {version('torch')} {version('deepspeed')}"
    return cache / "raygym" / "torch_extensions" / hashlib.blake2b(what.encode(), digest_size=6).hexdigest()


def use_own_folder() -> Path:
    """Make torch keep this environment's extensions in its `own_folder`; call it before one is loaded.

    In one folder for all, whichever environment (or clone) starts next compiles everything again for minutes, since the
    compiler's arguments name its paths, and leaves those that run with a library that was replaced under them.

    Returns:
        The folder.
    """
    folder = own_folder()
    os.environ[VARIABLE] = str(folder)
    return folder
