"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from raygym.testing import chaos


def write_whole(path: Path, text: str) -> None:
    """Write `path` so that a reader, or a kill, finds the old file or the new one; after an error, the old one."""
    new = path.with_name(f"{path.name}.new")
    try:
        chaos.at("disk.replace")
        # What lies there already, a link out of the folder included, is not written to.
        new.unlink(missing_ok=True)
        with new.open("x", encoding="utf-8") as file:
            file.write(text)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
