"""A tracker in a thread of its own: what it waits for, and what it fails with, is nothing to the run."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from raygym.run_row import Row
from raygym.tracking.tracker import Outcome, Tracker

logger = logging.getLogger(__name__)
# So often is a row refused while others are taken before it is given up: then the row is what is wrong.
_MOST_REFUSALS = 10
# More than that are not kept in memory for a service that is away.
_MOST_WAITING = 1000


@dataclass(slots=True, eq=False)
class _Waiting:
    step: int
    row: Row
    refused: int = 0
    """How often, while others were taken."""


class BackgroundTracker:
    """Connects, and passes rows on in order. A row that is refused is tried again with each later one and at the end,
    until it is clear that it alone is refused."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], Tracker],
        told: Callable[[str], None],
        logged: Callable[[str, int], None] = lambda run_id, step: None,
    ) -> None:
        """Start the thread.

        Args:
            name: for people.
            connect: called in the thread. Where it raises, this process logs nothing there.
            told: gets one line when something fails for the first time; called in the thread.
            logged: gets the run's id and the step up to which the tracker has all that it will take of this process,
                whenever that changes; in the thread as well.
        """
        self._name = name
        self._connect = connect
        self._told = told
        self._logged = logged
        self._rows: queue.SimpleQueue[tuple[int, Row] | Outcome] = queue.SimpleQueue()
        self._left: list[_Waiting] = []
        self._newest = -1
        # The first step of which it was not even told: the thread hangs in a call to it.
        self._never_told: int | None = None
        self._noted: int | None = None
        self._noted_below = math.inf
        self._warned = self._warned_of_refused = self._warned_of_many = False
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, row: Row) -> None:
        """Pass on a row; returns at once and never raises. It is left out while too many wait."""
        if self._rows.qsize() < _MOST_WAITING:
            self._rows.put((step, row))
        elif self._never_told is None:
            self._never_told = step
            self._told(self._too_many("newest"))

    def close(self, outcome: Outcome, timeout_s: float) -> None:
        """Give it time to take what is left. Never raises; what is not taken by then is told."""
        self._rows.put(outcome)
        self._thread.join(timeout=timeout_s)
        if self._thread.is_alive():
            self._told(f"{self._name} has not taken all rows within {timeout_s:g} s; metrics.jsonl has them")

    def _run(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._connect()
        except BaseException as error:  # libraries also call sys.exit, which would end this thread without a word
            self._failed(error, "gets no metrics of this run")
        while not isinstance(item := self._rows.get(), Outcome):
            if tracker is not None:
                self._newest, row = item
                # What waits of steps that are made again is not true any more.
                self._left = [waiting for waiting in self._left if waiting.step < self._newest]
                self._left.append(_Waiting(self._newest, row))
                self._pass_on(tracker)
        if tracker is not None:
            if self._left:
                self._pass_on(tracker)
            try:
                tracker.close(item)
            except BaseException as error:
                self._failed(error, "could not be told that the run has ended")

    def _pass_on(self, tracker: Tracker) -> None:
        """Try each waiting row once, in order; then note what it has."""
        oldest, *others = self._left
        taken = self._takes(tracker, oldest)
        if not taken and others:
            # Is it that row, or is nobody there? The newest one tells, so that not all are tried in vain each time.
            taken = self._takes(tracker, others.pop())
        if taken:
            for waiting in others:
                self._takes(tracker, waiting)
            for waiting in self._left:
                waiting.refused += 1
            self._give_up([waiting for waiting in self._left if waiting.refused >= _MOST_REFUSALS])
        self._forget(self._left[:-_MOST_WAITING])
        never_told = math.inf if self._never_told is None else self._never_told
        below = min(self._noted_below, never_told, *(waiting.step for waiting in self._left), math.inf)
        has = min(self._newest, below - 1)
        if has != self._noted:
            self._noted = int(has)
            self._logged(tracker.id, self._noted)

    def _takes(self, tracker: Tracker, waiting: _Waiting) -> bool:
        try:
            tracker.log(waiting.step, waiting.row)
        except BaseException as error:
            self._failed(error, f"does not take the metrics of step {waiting.step}; later ones are tried")
            return False
        self._left.remove(waiting)
        return True

    def _give_up(self, refused: list[_Waiting]) -> None:
        for waiting in refused:
            self._left.remove(waiting)
            so = f"refused the metrics of step {waiting.step} {_MOST_REFUSALS} times while it took others"
            logger.warning("%s %s", self._name, so)
            if not self._warned_of_refused:
                self._warned_of_refused = True
                self._told(f"warning: {self._name} {so}, and is sent them no more; metrics.jsonl has all rows")

    def _forget(self, oldest: list[_Waiting]) -> None:
        """They are not noted: a process that goes on with the run sends them again."""
        for waiting in oldest:
            self._left.remove(waiting)
            self._noted_below = min(self._noted_below, waiting.step)
            if not self._warned_of_many:
                self._warned_of_many = True
                self._told(self._too_many("oldest"))

    def _too_many(self, which: str) -> str:
        return (
            f"warning: more than {_MOST_WAITING} rows wait for {self._name}; the {which} are left out there, and "
            "metrics.jsonl has all rows"
        )

    def _failed(self, error: BaseException, so: str) -> None:
        if self._warned:
            logger.info("%s %s: %s: %s", self._name, so, type(error).__name__, error)  # each step while it is away
            return
        self._warned = True
        logger.warning("%s %s", self._name, so, exc_info=error)
        reason = " ".join(str(error).split())[:300]
        self._told(
            f"warning: {self._name} {so} ({type(error).__name__}: {reason}); the run goes on, and metrics.jsonl "
            "has all rows"
        )
