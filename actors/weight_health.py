"""What the weight sync finds out about replicas and weight stores, for the run's supervisor."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from raygym.actors.supervisor import Supervisor
from raygym.supervision import Kind

logger = logging.getLogger(__name__)
_CALLED = {Kind.REPLICA: "replica", Kind.WEIGHT_STORE: "the weight store of node"}
_END_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _News:
    kind: Kind
    name: str
    why: str = ""
    """Of a loss; empty where it works."""
    serving: int = 0
    """Parts of the kind that worked then."""


class WeightHealth:
    """Any thread may tell it, and waits for nothing: a thread of its own passes on what it is told, in order.

    What comes in the place of a lost part may have another name; then the oldest loss is over.
    """

    def __init__(self, supervisor: Supervisor | None = None, wanted: Callable[[], int | None] = lambda: None) -> None:
        """Begin.

        Args:
            supervisor: is told.
            wanted: how many replicas there are to be, where that is known. One that goes when there are as many without
                it was taken away on purpose. May take its time.
        """
        self._supervisor = supervisor or Supervisor()
        self._wanted = wanted
        self._lost: dict[Kind, list[str]] = {kind: [] for kind in _CALLED}
        self._failure: Exception | None = None
        self._news: queue.SimpleQueue[_News | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="weight-health", daemon=True)
        self._thread.start()

    def lost(self, kind: Kind, name: str, why: str, serving: int = 0) -> None:
        """A part that worked does so no more, and `serving` others do. `check` says whether the run may go on."""
        self._news.put(_News(kind, name, why, serving))

    def works(self, kind: Kind, name: str) -> None:
        """A part does its work, for the first time or again."""
        self._news.put(_News(kind, name))

    def failed(self, error: Exception) -> None:
        """A thread that nobody waits for cannot go on."""
        self._failure = self._failure or error

    def check(self) -> None:
        """Raise what has failed: GivenUp where something was lost more often than the config allows."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Pass on what there is, and end."""
        self._news.put(None)
        self._thread.join(timeout=_END_TIMEOUT_S)

    def _run(self) -> None:
        while (news := self._news.get()) is not None:
            try:
                self._pass_on(news)
            except Exception as error:  # GivenUp among others
                self.failed(error)

    def _pass_on(self, news: _News) -> None:
        called, lost = _CALLED[news.kind], self._lost[news.kind]
        if not news.why:
            if lost:
                over = lost.pop(lost.index(news.name) if news.name in lost else 0)
                self._supervisor.recovered(news.kind, f"{called} {over}")
            return
        if news.kind is Kind.REPLICA and (wanted := self._wanted()) is not None and news.serving >= wanted:
            logger.info("replica %s was taken away", news.name)
            return
        lost.append(news.name)
        self._supervisor.lost(news.kind, f"{called} {news.name}", f"{called} {news.name} {news.why}")
