"""What is in a folder, with sizes and checksums: whether all of it is there, unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raygym.durable import replace_durably

MANIFEST = "manifest.json"


class DamagedFolderError(ValueError):
    """A folder is not as it was written. The text says what is wrong with it."""


def write_manifest(folder: Path, head: Mapping[str, Any]) -> None:
    """Write `manifest.json`: `head`, and size and checksum of every other file below `folder`."""
    files = {name: _entry(folder / name) for name in sorted(_names(folder))}
    content = {**head, "files": files}
    sealed = {**content, "checksum": _seal(content)}
    replace_durably(folder / MANIFEST, (json.dumps(sealed, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whose own checksum is right; what it says of the files is not looked at.

    Raises:
        DamagedFolderError: there is none, or it was changed.
    """
    try:
        content: Any = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise DamagedFolderError(f"has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise DamagedFolderError(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _seal(content):
        raise DamagedFolderError(f"its {MANIFEST} was changed or is cut off")
    return content


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Read every file that the manifest names.

    Raises:
        DamagedFolderError: one is missing, cannot be read, or has another size or checksum. Files beyond those do not
            matter.
    """
    for name, expected in manifest["files"].items():
        try:
            _check_file(folder / name, name, expected)
        except OSError as error:  # a disk's bad sector, a stale handle of a network's disk
            raise DamagedFolderError(f"{name} cannot be read ({error.strerror or error})") from error


def _check_file(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise DamagedFolderError(f"{name} is missing")
    # The size first: a file that is cut off is told without being read.
    if (size := path.stat().st_size) != expected["size"]:
        raise DamagedFolderError(f"{name} has {size} bytes, expected {expected['size']}")
    if _entry(path) != expected:
        raise DamagedFolderError(f"{name} has another checksum than when it was written")


def _names(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths} - {MANIFEST}


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {"size": path.stat().st_size, "blake2b": digest.hexdigest()}


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
