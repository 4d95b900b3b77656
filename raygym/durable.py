"""Files that a crash of the machine, not only of the process, finds whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from raygym.testing import chaos


def sync_file(path: Path) -> None:
    """Return when the file's bytes, or the folder's list of names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """`sync_file` for everything in a folder, and for the folder."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync_file(Path(folder) / name)
        sync_file(Path(folder))


def replace_durably(path: Path, data: bytes) -> None:
    """Write `path` so that whoever reads it, after whatever happened, finds the old file or the new one."""
    new = path.with_name(f"{path.name}.new")
    try:
        chaos.at("disk.replace")
        new.unlink(missing_ok=True)  # of a writer that was killed, or a link that leads elsewhere
        with new.open("xb") as file:
            file.write(data)
        sync_file(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync_file(path.parent)
