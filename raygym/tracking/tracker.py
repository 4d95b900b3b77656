"""What a tracker is, and what it is told of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from raygym.run_row import Row


class Outcome(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The run that is tracked."""

    name: str
    path: Path
    """Its folder."""
    config: Mapping[str, Any]
    """As plain values."""
    id: str
    """What the tracker called it when it was begun, where this process goes on with it; else empty."""


class Tracker(Protocol):
    """Somebody's service or library. Every method may raise whatever that raises, and may take its time."""

    id: str
    """By which another process can go on with this run."""

    def log(self, step: int, row: Row) -> None:
        """What is known of one step. A step that was made again after a resume comes again."""

    def close(self, outcome: Outcome) -> None:
        """The run has ended; what was logged is written or sent by the time that this returns."""
