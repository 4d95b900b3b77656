"""What the weight sync finds out about replicas and weight stores, for the run's supervisor."""

from __future__ import annotations

import threading

from raygym.actors.supervisor import Supervisor
from raygym.supervision import GivenUp, Kind

_CALLED = {Kind.REPLICA: "replica", Kind.WEIGHT_STORE: "the weight store of node"}


class WeightHealth:
    """Any thread may tell it.

    What comes in the place of a lost part may have another name; then the oldest loss is over.
    """

    def __init__(self, supervisor: Supervisor | None = None) -> None:
        self._supervisor = supervisor or Supervisor()
        self._lost: dict[Kind, list[str]] = {kind: [] for kind in _CALLED}
        self._lock = threading.Lock()
        self._failure: Exception | None = None

    def lost(self, kind: Kind, name: str, why: str) -> None:
        """A part that worked does so no more. Whether the run may go on is for `check` to say."""
        with self._lock:
            self._lost[kind].append(name)
        called = f"{_CALLED[kind]} {name}"
        try:
            self._supervisor.lost(kind, called, f"{called} {why}")
        except GivenUp as given_up:
            self.failed(given_up)

    def works(self, kind: Kind, name: str) -> None:
        """A part does its work, for the first time or again."""
        with self._lock:
            lost = self._lost[kind]
            if not lost:
                return
            over = lost.pop(lost.index(name) if name in lost else 0)
        self._supervisor.recovered(kind, f"{_CALLED[kind]} {over}")

    def failed(self, error: Exception) -> None:
        """A thread that nobody waits for cannot go on."""
        self._failure = self._failure or error

    def check(self) -> None:
        """Raise what has failed: GivenUp where something was lost more often than the config allows."""
        if self._failure is not None:
            raise self._failure
