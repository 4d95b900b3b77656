"""Cutting a run's files back to a step. What is cut off is moved aside, never lost; a kill half-way harms nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raygym.config_section import ConfigError
from raygym.durable import replace_durably

Row = dict[str, Any]


def discard_folder(run: Path, step: int) -> Path:
    """A name below `discarded/` that is free, for what came after `step`; the folder is not made yet."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-after-step-{step}"
    found, number = run / "discarded" / name, 1
    while found.exists():
        number += 1
        found = run / "discarded" / f"{name}-{number}"
    return found


def cut_lines(path: Path, keep: Callable[[Row], bool], discarded: Path) -> list[Row]:
    """Leave the rows of a JSONL file that are to be kept, and move the others into the folder `discarded`.

    Every row is in one of the two files at any moment; the old file is replaced as a whole. A last line without its end
    is what a kill has left half-written, and goes, too.

    Returns:
        What was kept.

    Raises:
        ConfigError: a line is no JSON object, so the file was changed by somebody else.
    """
    if not path.exists():
        return []
    kept: list[tuple[bytes, Row]] = []
    cut: list[bytes] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        row = _row(path, number, line) if line.endswith(b"\n") else None
        if row is not None and keep(row):
            kept.append((line, row))
        else:
            cut.append(line)
    if cut:
        discarded.mkdir(parents=True, exist_ok=True)
        replace_durably(discarded / path.name, b"".join(cut))
        replace_durably(path, b"".join(line for line, _ in kept))
    return [row for _, row in kept]


def move_into(path: Path, discarded: Path) -> None:
    """Move a file or folder, where there is one, into the folder `discarded`."""
    if path.exists():
        discarded.mkdir(parents=True, exist_ok=True)
        path.rename(discarded / path.name)


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ConfigError(
            f"{path}: line {number} is no JSON object, so the file was changed and the run cannot go on from it; "
            "restore it, or use --fresh to move the run aside and begin anew"
        )
    return row
