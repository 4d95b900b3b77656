"""Checkpoints in an object store or on another disk: whole or not at all, though such stores rename nothing.

    <url>/<name>/0001-5e1f09aa/                 a run of that name, from its beginning on; --fresh begins the next one
        begun.json
        step_000012-9c41d2e7/                   one upload
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import split_protocol, url_to_fs

from raygym.config_section import ConfigError

_RUN = re.compile(r"(\d{4,})-[0-9a-f]{8}")
_UPLOAD = re.compile(r"step_(\d{6,})-[0-9a-f]{8}")
_WHOLE = "whole.json"


def upload_name(step: int) -> str:
    """A name that no other upload has."""
    return f"step_{step:06d}-{uuid.uuid4().hex[:8]}"


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

    def __init__(self, fs: Any, root: str) -> None:
        """`fs` is fsspec's; nothing is read or written yet."""
        self._fs = fs
        self._root = root.rstrip("/")

    @classmethod
    def open(cls, url: str, name: str) -> MirrorStore:
        """That of runs of this name.

        Raises:
            ConfigError: no such file system is known, or its package is not installed.
        """
        local = split_protocol(url)[0] in (None, "file", "local")
        try:
            fs, root = url_to_fs(url, **({"auto_mkdir": True} if local else {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.mirror: {url} cannot be opened ({error}); expected a folder or a URL that fsspec knows, "
                "such as s3://bucket/prefix (pip install s3fs) or gs://bucket/prefix (pip install gcsfs)"
            ) from error
        return cls(fs, f"{root.rstrip('/')}/{name}")

    def runs(self) -> list[str]:
        """The runs of this name, the current one last."""
        found = (_RUN.fullmatch(entry) for entry in self._list(self._root))
        return [match[0] for match in sorted((m for m in found if m), key=lambda m: (int(m[1]), m[0]))]

    def begin_run(self) -> str:
        """Make a new run the current one; returns its name."""
        numbers = [int(run.split("-")[0]) for run in self.runs()]
        run = f"{max(numbers, default=0) + 1:04d}-{uuid.uuid4().hex[:8]}"
        self._fs.pipe_file(f"{self._root}/{run}/begun.json", b"{}\n")
        return run

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
        """Read the files of an upload's folder `part` into the folder `local`, which is made anew."""
        shutil.rmtree(local, ignore_errors=True)
        local.mkdir(parents=True)
        for name in upload.files:
            head, _, below = name.partition("/")
            if head == part and ".." not in Path(below).parts and not Path(below).is_absolute():
                (local / below).parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(f"{self._root}/{run}/{upload.folder}/{name}", str(local / below))

    def remove_all_but(self, run: str, kept: Iterable[str]) -> None:
        """Remove a run's other uploads, also those that are not whole."""
        for folder in set(self._folders(run)) - set(kept):
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
