"""events.jsonl: what happened to a run's parts. Whoever tells it keeps parts alive, so it must never wait."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from raygym.full_disk import append_whole
from raygym.supervision import PartEvent


class EventLog:
    """The writer of the file. Used from any thread."""

    def __init__(self, path: Path, told: Callable[[str], None]) -> None:
        """Nothing is written yet. `told` gets lines for a person."""
        self._path = path
        self._told = told
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []

    def append(self, event: PartEvent) -> None:
        """Write an event; where that is not possible now, keep it for the next `append` or `flush`. Never raises."""
        self._write([json.dumps(event.to_json()).encode() + b"\n"])

    def flush(self) -> None:
        """Try again to write what could not be written. Never waits nor raises."""
        self._write([])

    def _write(self, lines: list[bytes]) -> None:
        with self._lock:
            waited = bool(self._waiting)
            self._waiting += lines
            if not self._waiting:
                return
            try:
                append_whole(self._path, b"".join(self._waiting), sync=False)
            except OSError as error:
                problem = "" if waited else f"{self._path} cannot be written ({error}); it is tried again later"
            else:
                self._waiting = []
                problem = ""
        if problem:
            self._told(problem)
