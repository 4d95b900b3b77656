"""A tracker in a thread of its own: what it waits for, and what it fails with, is nothing to the run."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

from raygym.run_row import Row
from raygym.tracking.tracker import Outcome, Tracker

logger = logging.getLogger(__name__)


class BackgroundTracker:
    """Connects, and passes rows on in order. A row that is refused is tried again with the next one and at the end."""

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
            logged: gets the run's id and the step of each row that was taken; in the thread as well.
        """
        self._name = name
        self._connect = connect
        self._told = told
        self._logged = logged
        self._rows: queue.SimpleQueue[tuple[int, Row] | Outcome] = queue.SimpleQueue()
        self._left: deque[tuple[int, Row]] = deque()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, row: Row) -> None:
        """Pass on a row; returns at once and never raises."""
        self._rows.put((step, row))

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
                self._left.append(item)
                self._pass_on(tracker)
        if tracker is not None:
            self._pass_on(tracker)
            try:
                tracker.close(item)
            except BaseException as error:
                self._failed(error, "could not be told that the run has ended")

    def _pass_on(self, tracker: Tracker) -> None:
        try:
            while self._left:
                step, row = self._left[0]
                tracker.log(step, row)
                self._left.popleft()
                self._logged(tracker.id, step)
        except BaseException as error:
            self._failed(error, f"does not take the metrics of step {self._left[0][0]}; later ones are tried")

    def _failed(self, error: BaseException, so: str) -> None:
        logger.warning("%s %s", self._name, so, exc_info=error)
        if not self._warned:
            self._warned = True
            reason = " ".join(str(error).split())[:300]
            self._told(
                f"warning: {self._name} {so} ({type(error).__name__}: {reason}); the run goes on, and metrics.jsonl "
                "has all rows"
            )
