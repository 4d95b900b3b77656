"""Where an engine's processes put their temporary files: below Ray's session directory, so that they go with it.

vLLM leaves the sockets between its processes behind at every end, and the file by which they meet where it is killed.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

_FOLDER = "engines"
# The kernel takes 107 characters for a socket; vLLM's names are a UUID.
_LONGEST = 107 - len("/") - 36


def use_folder_of(session: Path, compiled: str) -> Path | None:
    """From now on, temporary files of this process and those that it starts are in a folder below `session`.

    Args:
        session: Ray's session directory.
        compiled: where PyTorch keeps compiled code if nothing else is set; that stays there, for the next run.

    Returns:
        The folder. None: nothing was changed, since sockets below it would have too long a name, or it cannot be had.
    """
    folder = session / _FOLDER
    if len(os.fsencode(folder)) > _LONGEST:
        return None
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():  # every user may write to Ray's directory
            return None
        # Precompiled headers are where temporary files are, whatever is set: without them each start compiles for 6 s.
        # Nothing can be made below a link whose folder is missing, as on a new machine.
        Path(compiled).mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            (folder / Path(compiled).name).symlink_to(compiled)
    except OSError:
        return None
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", compiled)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder
