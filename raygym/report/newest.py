"""The newest trajectories of a run: of its last files so many bytes as are read in a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygym.run_reading import is_own, json_lines


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
    return json_lines(part.path, damaged, within=run, skipped=part.skipped)
