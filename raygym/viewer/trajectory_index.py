"""Where each trajectory of a run is, and what the table shows of it. Built piece by piece, while the run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from raygym.run_reading import is_own
from raygym.viewer.growing_lines import GrowingLines
from raygym.viewer.trajectory_row import TrajectoryRow, dropped_row, trajectory_row

_NAME = re.compile(r"(step|validation)_(\d+)")
_ALARM = re.compile(r"step_(\d+)_\w+")


@dataclass(slots=True)
class _File:
    lines: GrowingLines
    kind: str
    step: int | None
    rows: list[TrajectoryRow] = field(default_factory=list)
    count: int = 0
    """Lines so far, also those that are no trajectory."""
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of the files is in the index."""

    read_bytes: int
    total_bytes: int
    files: int
    unreadable: int
    """Lines that are no trajectory."""


class TrajectoryIndex:
    """The index of one run. One thread refreshes it; any may read it meanwhile, and sees what is there so far."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet.

        Args:
            path: the folder of a run or of a rollout, or one file of trajectories.
        """
        # A file was asked for itself, wherever a link to it leads.
        self._single = path.resolve() if path.is_file() else None
        self._path = path if self._single is None else self._single.parent
        self._files: dict[str, _File] = {}
        self.revision = 0
        """Counts changes."""

    @property
    def problem(self) -> str:
        """Why a file could not be read, when that was tried last; of several, one."""
        return next((file.lines.problem for file in list(self._files.values()) if file.lines.problem), "")

    def refresh(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read what was added since. `stopped` is asked at every line."""
        self._discover()
        for name, file in list(self._files.items()):
            if file.lines.restarted():
                file.rows, file.count, file.unreadable = [], 0, 0
                self.revision += 1
            for offset, line in file.lines.new():
                if stopped():
                    return
                self._add(name, file, offset, line)
                self.revision += 1

    @property
    def rows(self) -> list[TrajectoryRow]:
        """All rows so far, by file and line."""
        return [row for file in list(self._files.values()) for row in list(file.rows)]

    @property
    def progress(self) -> Progress:
        """How far it is."""
        files = list(self._files.values())
        return Progress(
            sum(file.lines.looked_at for file in files),
            sum(file.lines.size for file in files),
            len(files),
            sum(file.unreadable for file in files),
        )

    def find(self, file: str, number: int) -> TrajectoryRow | None:
        """The trajectory of that name; None where there is none. No path is made of what is asked for."""
        found = self._files.get(file)
        if found is None:
            return None
        # Lines that are no trajectory have a number, too, and no row.
        rows = [row for row in found.rows[max(0, number - found.unreadable) : number + 1] if row.number == number]
        return rows[0] if rows and rows[0].offset >= 0 else None

    def group(self, file: str, group_id: str) -> list[TrajectoryRow]:
        """The episodes of a group, in order; empty where there is none. A validation plays the same groups again, so
        the file is part of the name."""
        found = self._files.get(file)
        rows = [row for row in found.rows if row.group_id == group_id and row.offset >= 0] if found else []
        return sorted(rows, key=lambda row: (row.episode or 0, row.number))

    def line(self, row: TrajectoryRow) -> bytes:
        """The trajectory itself.

        Raises:
            OSError: the file cannot be read, or is another one by now.
            LookupError: it was cut meanwhile.
        """
        lines = self._files[row.file].lines
        if lines.generation != row.generation:
            raise LookupError(f"{row.file} was replaced meanwhile")
        return lines.part(row.offset, row.length)

    def _add(self, name: str, file: _File, offset: int, line: bytes) -> None:
        number, file.count = file.count, file.count + 1
        try:
            if file.kind == "dropped":
                record = json.loads(line)
                if isinstance(record, dict) and not record.get("trained"):
                    file.rows.append(dropped_row(record, number, name))
            else:
                named = {"file": name, "number": number, "kind": file.kind, "step": file.step}
                at = {"offset": offset, "generation": file.lines.generation}
                file.rows.append(trajectory_row(line, **named, **at))  # type: ignore[arg-type]
        # Each line by itself: none may end the reading of all others.
        except (ValueError, ArithmeticError, RecursionError):
            file.unreadable += 1

    def _discover(self) -> None:
        if self._single is not None:
            self._know(self._single, "rollout", None)
            return
        self._know(self._path / "trajectories.jsonl", "rollout", None)
        for path in sorted((self._path / "trajectories").glob("*.jsonl")):
            if found := _NAME.fullmatch(path.stem):
                self._know(path, found[1], int(found[2]))
        alarms = self._alarms()
        for name in [name for name, file in self._files.items() if file.kind == "alarm"]:
            if name not in {self._name(path) for path in alarms.values()}:
                del self._files[name]
                self.revision += 1
        for step, path in alarms.items():
            self._know(path, "alarm", step)
        self._know(self._path / "ledger.jsonl", "dropped", None)
        self._know(self._path / "dropped.jsonl", "dropped", None)

    def _alarms(self) -> dict[int, Path]:
        """By step the file of an alarm. Several alarms of a step have the same trajectories, and so has the step's own
        file, where they are kept at all."""
        found: dict[int, Path] = {}
        for path in sorted((self._path / "alarms").glob("*/trajectories.jsonl")):
            named = _ALARM.fullmatch(path.parent.name)
            if named and f"trajectories/step_{int(named[1]):06d}" not in self._files:
                found.setdefault(int(named[1]), path)
        return found

    def _know(self, path: Path, kind: str, step: int | None) -> None:
        name = self._name(path)
        if name not in self._files and is_own(path, self._path):
            self._files[name] = _File(GrowingLines(path, self._path), kind, step)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._path).with_suffix("").as_posix()
