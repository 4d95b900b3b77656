"""Checkpoints in an object store or on another disk: whole or not at all, though such stores rename nothing.

    <url>/<name>/0001-5e1f09aa/                 a run of that name, from its beginning on; --fresh begins the next one
        begun.json
        claims/0003-77aa01c2                    a process has begun to write this run; the newest one alone may
        step_000012-0003-77aa01c2-9c41d2e7/     one upload, and whose it is
            checkpoint/..., run/metrics.jsonl, ...
            whole.json                          its files and their sizes; written last, so what has it is whole

Nothing that is there is ever written again: a checkpoint that is made anew is another folder. What is inside a file is
guarded by the manifests that travel with it (`file_manifest`).
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fsspec.core import split_protocol, url_to_fs
from fsspec.registry import get_filesystem_class

from raygym.config_section import ConfigError
from raygym.file_manifest import DamagedFolderError

_NUMBERED = re.compile(r"(\d{4,})-[0-9a-f]{8}")
# Those that were made before there were claims name none.
_UPLOAD = re.compile(r"step_\d{6,}-(?:(?P<claim>\d{4,}-[0-9a-f]{8})-)?[0-9a-f]{8}")
_WHOLE = "whole.json"


def upload_name(step: int, claim: str) -> str:
    """A name that no other upload has, with whose it is."""
    return f"step_{step:06d}-{claim}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True, slots=True)
class Upload:
    """One that is whole."""

    folder: str
    """Its name below the run's."""
    step: int
    seal: str
    """A checksum of the checkpoint's manifest: equal ones are equal checkpoints."""
    files: dict[str, int]
    """Sizes in bytes, by path below the folder."""


class MirrorStore:
    """The place below `<url>/<name>/`. What the file system raises, these methods raise: its errors are of any type."""

    def __init__(self, connect: Callable[[], tuple[Any, str]]) -> None:
        """`connect` gives fsspec's file system and the folder in it. It is called when they are needed first."""
        self._connect = connect

    @classmethod
    def open(cls, url: str, name: str) -> MirrorStore:
        """That of runs of this name. Some file systems connect when they are made: nothing is made yet.

        Raises:
            ConfigError: no such file system is known, or its package is not installed.
        """
        parts = url.split("::")
        try:
            for part in parts:
                chained = len(parts) > 1 and re.fullmatch("[a-z]+", part)
                get_filesystem_class(part if chained else split_protocol(part)[0])
        except Exception as error:  # of any type: it imports a package
            raise ConfigError(
                f"checkpoint.mirror: {url} cannot be opened ({error}); expected a folder or a URL that fsspec knows, "
                "such as s3://bucket/prefix (pip install s3fs) or gs://bucket/prefix (pip install gcsfs)"
            ) from error
        return cls(partial(_connected, url, name))

    @cached_property
    def _place(self) -> tuple[Any, str]:
        fs, root = self._connect()
        return fs, root.rstrip("/")

    @property
    def _fs(self) -> Any:
        return self._place[0]

    @property
    def _root(self) -> str:
        return self._place[1]

    def runs(self) -> list[str]:
        """The runs of this name, the current one last."""
        return _by_number(self._list(self._root))

    def begin_run(self) -> str:
        """Make a new run the current one; returns its name."""
        run = _next(self.runs())
        self._fs.pipe_file(f"{self._root}/{run}/begun.json", b"{}\n")
        return run

    def claims(self, run: str) -> list[str]:
        """Who has begun to write a run, the newest one last."""
        return _by_number(self._list(f"{self._root}/{run}/claims"))

    def claim(self, run: str) -> str:
        """Begin to write a run, in whose place ever; returns this claim. Of two at once, one is the newer."""
        claim = _next(self.claims(run))
        self._fs.pipe_file(f"{self._root}/{run}/claims/{claim}", b"{}\n")
        return claim

    def uploads(self, run: str) -> list[Upload]:
        """Those that are whole, by rising step."""
        found = (self._read(run, folder) for folder in self._folders(run))
        return sorted((upload for upload in found if upload), key=lambda upload: upload.step)

    def put(self, run: str, folder: str, name: str, local: Path) -> None:
        """Write a file as `name` of the upload `folder`, which is not whole yet.

        Raises:
            OSError: the store took another number of bytes. It may raise errors of other types, too.
        """
        target, size = f"{self._root}/{run}/{folder}/{name}", local.stat().st_size
        self._fs.put_file(str(local), target)
        self._fs.invalidate_cache()
        if (there := self._fs.info(target)["size"]) != size:
            raise OSError(f"{name} has {there} bytes there, expected {size}")

    def complete(self, run: str, upload: Upload) -> None:
        """All files of an upload were put: it is whole."""
        whole = {"step": upload.step, "seal": upload.seal, "files": upload.files}
        self._fs.pipe_file(f"{self._root}/{run}/{upload.folder}/{_WHOLE}", json.dumps(whole).encode())

    def get(self, run: str, upload: Upload, part: str, local: Path) -> None:
        """Read the files of an upload's folder `part` into the folder `local`, which is made anew.

        Raises:
            DamagedFolderError: one is not there. The store may raise errors of other types, too.
        """
        shutil.rmtree(local, ignore_errors=True)
        local.mkdir(parents=True)
        for name in upload.files:
            head, _, below = name.partition("/")
            if head == part and ".." not in Path(below).parts and not Path(below).is_absolute():
                (local / below).parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._fs.get_file(f"{self._root}/{run}/{upload.folder}/{name}", str(local / below))
                except FileNotFoundError as error:
                    raise DamagedFolderError(f"{name} is missing there") from error

    def remove_all_but(self, run: str, kept: Iterable[str], claim: str) -> None:
        """Remove a run's other uploads, also those that are not whole, but none of a newer claim than this one."""
        for folder in set(self._folders(run)) - set(kept):
            match = _UPLOAD.fullmatch(folder)
            if match and match["claim"] and _by_number([match["claim"], claim])[-1] != claim:
                continue  # somebody may be writing it
            path = f"{self._root}/{run}/{folder}"
            # First what makes it whole: one that is half removed must not look like a checkpoint.
            if self._fs.exists(f"{path}/{_WHOLE}"):
                self._fs.rm_file(f"{path}/{_WHOLE}")
            self._fs.rm(path, recursive=True)

    def _folders(self, run: str) -> list[str]:
        return [name for name in self._list(f"{self._root}/{run}") if _UPLOAD.fullmatch(name)]

    def _list(self, path: str) -> list[str]:
        self._fs.invalidate_cache()  # others write there, too
        try:
            found = self._fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in found)

    def _read(self, run: str, folder: str) -> Upload | None:
        try:
            whole: Any = json.loads(self._fs.cat_file(f"{self._root}/{run}/{folder}/{_WHOLE}"))
            return Upload(folder, int(whole["step"]), str(whole["seal"]), dict(whole["files"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # a kill in the middle of it
            return None


def _connected(url: str, name: str) -> tuple[Any, str]:
    local = split_protocol(url)[0] in (None, "file", "local")
    fs, root = url_to_fs(url, **({"auto_mkdir": True} if local else {}))
    return fs, f"{root.rstrip('/')}/{name}"


def _by_number(names: Iterable[str]) -> list[str]:
    found = (match for name in names if (match := _NUMBERED.fullmatch(name)))
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), match[0]))]


def _next(names: list[str]) -> str:
    number = int(names[-1].split("-")[0]) if names else 0
    return f"{number + 1:04d}-{uuid.uuid4().hex[:8]}"
