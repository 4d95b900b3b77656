"""The folder of injected faults that fired: each claimed once, over all processes and restarts, and logged."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

_LOG = "fired.jsonl"


@dataclass(frozen=True, slots=True)
class Fired:
    """One fault that happened."""

    time: str
    """Of the wall clock, ISO 8601 in UTC, just before it happened."""
    pid: int
    """Of the process that it happened to."""
    point: str
    kind: str
    seconds: float = 0.0
    """How long it lasts, where it is one that ends."""

    @property
    def seconds_since_epoch(self) -> float:
        """`time` as a number."""
        return datetime.fromisoformat(self.time).timestamp()


class Claims:
    """One run's folder of fired faults. It is made by whoever needs it first."""

    def __init__(self, folder: Path) -> None:
        """`folder` is on a disk that all processes of the run see."""
        self.folder = folder

    def claim(self, fault: int, times: int) -> bool:
        """Whether the fault of this number may happen once more, of `times` in all. Only one process is told so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(self.taken(fault), times):
            try:
                os.close(os.open(self._path(fault, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            return True
        return False

    def taken(self, fault: int) -> int:
        """How often the fault of this number was claimed."""
        number = 0
        while self._path(fault, number).exists():
            number += 1
        return number

    def seconds_ago(self, fault: int) -> float:
        """Since the last claim of the fault of this number; infinite where there is none."""
        taken = self.taken(fault)
        return time.time() - self._path(fault, taken - 1).stat().st_mtime if taken else float("inf")

    def log(self, point: str, kind: str, seconds: float = 0.0, pid: int | None = None) -> Fired:
        """Note a fault that is about to happen to the process `pid`, by default this one."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        fired = Fired(now, os.getpid() if pid is None else pid, point, kind, seconds)
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / _LOG, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        try:
            os.write(handle, json.dumps(asdict(fired)).encode() + b"\n")  # one call: lines of processes do not mix
        finally:
            os.close(handle)
        return fired

    def fired(self) -> list[Fired]:
        """All that was logged, in order of time."""
        path = self.folder / _LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return sorted((Fired(**json.loads(line)) for line in lines), key=lambda fired: fired.time)

    def _path(self, fault: int, number: int) -> Path:
        return self.folder / f"fault-{fault:03d}-{number:03d}"
