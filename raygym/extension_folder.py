"""Where torch compiles DeepSpeed's extensions: a folder for each environment, instead of one for all of a user's."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

VARIABLE = "TORCH_EXTENSIONS_DIR"


def use_own_folder() -> Path:
    """Make torch keep this environment's extensions in a folder of their own; call it before one is loaded.

    In one folder for all, whichever environment (or clone) starts next compiles everything again for minutes, since the
    compiler's arguments name its paths, and leaves those that run with a library that was replaced under them. A
    folder that the user has chosen, by `TORCH_EXTENSIONS_DIR`, is kept.

    Returns:
        The folder.
    """
    if not os.environ.get(VARIABLE):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        what = f"{sys.prefix} {version('torch')} {version('deepspeed')}"
        key = hashlib.blake2b(what.encode(), digest_size=6).hexdigest()
        os.environ[VARIABLE] = str(cache / "raygym" / "torch_extensions" / key)
    return Path(os.environ[VARIABLE])
