"""The newest trajectories of a run: of its last files so many bytes as are read in a few seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygym.run_reading import UnreadableRun, check_own, is_own, json_lines


@dataclass(frozen=True, slots=True)
class Part:
    """The end of a file, or all of it."""

    step: int
    path: Path
    skipped: int
    """Bytes at its beginning."""


def newest(files: Sequence[tuple[int, Path]], run: Path, most_bytes: int) -> list[Part]:
    """What is read of files that are in order: the newest first, together at most so many bytes."""
    found: list[Part] = []
    left = most_bytes
    for step, path in reversed(files):
        if left <= 0:
            break
        size = path.stat().st_size if is_own(path, run) else 0
        found.append(Part(step, path, max(0, size - left)))
        left -= size
    return found


def records(part: Part, run: Path, damaged: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Its lines that are whole, one at a time; `damaged` is told of others, and of a link out of `run`."""
    if not part.skipped:
        yield from json_lines(part.path, damaged, within=run)
        return
    try:
        check_own(part.path, run)
    except UnreadableRun as error:
        damaged(str(error))
        return
    with part.path.open("rb") as file:
        file.seek(part.skipped - 1, os.SEEK_SET)
        file.readline()
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield record
            else:
                damaged(f"{part.path}: a line is no JSON object; the file was damaged or changed")
