"""The one place of a run that is told which of its parts are lost and which are back. Any thread may tell it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from raygym.supervision import GivenUp, Health, Kind, PartEvent, What
from raygym.supervision_config import SupervisionConfig


class Supervisor:
    """Counts restarts against their budgets, and tells people. What to do about a loss is its caller's policy.

    Whoever finds a part lost calls `lost`, makes another one, and calls `recovered` when it works. Events are told in
    order, one at a time, by whichever thread is at it: another one that brings more meanwhile does not wait for it.
    """

    def __init__(
        self,
        config: SupervisionConfig | None = None,
        record: Callable[[PartEvent], None] = lambda _: None,
        told: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """All are well.

        Args:
            config: the budgets.
            record: gets every event, one at a time.
            told: gets a line for a person.
            clock: seconds since the epoch.
        """
        self._health = Health(config or SupervisionConfig(), clock)
        self._record = record
        self._told = told
        self._lock = threading.Lock()
        self._untold: deque[PartEvent] = deque()
        # Held by who tells. It is not the lock of the counts: telling may write to a disk.
        self._telling = threading.Lock()

    @property
    def restarts(self) -> dict[str, int]:
        """See `Health.restarts`."""
        with self._lock:
            return self._health.restarts

    def down(self) -> list[tuple[Kind, str]]:
        """The parts that are lost now, by kind and name."""
        with self._lock:
            return self._health.down

    def lost(self, kind: Kind, name: str, cause: str, at_s: float | None = None) -> None:
        """A part is lost; each call counts as one loss. See `Health.lost`.

        Raises:
            GivenUp: once too often. It need not be started again, the run has to end.
        """
        with self._lock:
            events = self._health.lost(kind, name, cause, at_s)
            self._untold.extend(events)
        self._tell()
        if events[-1].what is What.GIVEN_UP:
            raise GivenUp(events[-1].cause)

    def restarted(self, kind: Kind, name: str) -> None:
        """A lost part runs again, but does not do its work yet."""
        with self._lock:
            self._untold.extend(self._health.restarted(kind, name))
        self._tell()

    def recovered(self, kind: Kind, name: str, at_s: float | None = None, incarnation: str = "") -> None:
        """A part works; where it was lost, that is told with the seconds that it took. See `Health.recovered`.

        Raises:
            GivenUp: it was lost unseen, and that was once too often.
        """
        with self._lock:
            events = self._health.recovered(kind, name, at_s, incarnation)
            self._untold.extend(events)
        self._tell()
        for event in events:
            if event.what is What.GIVEN_UP:
                raise GivenUp(event.cause)

    def given_up(self, kind: Kind, name: str, cause: str, at_s: float | None = None) -> None:
        """One part stays lost, and the run goes on without it."""
        with self._lock:
            self._untold.extend(self._health.given_up(kind, name, cause, at_s))
        self._tell()

    def progressed(self, kind: Kind) -> None:
        """See `Health.progressed`."""
        with self._lock:
            self._health.progressed(kind)

    def relay(self, events: Sequence[PartEvent]) -> None:
        """Take over what another process has noticed. Raises GivenUp as `lost` does."""
        for event in events:
            if event.what is What.LOST:
                self.lost(event.kind, event.name, event.cause, event.time_s)
            elif event.what is What.RECOVERED:
                self.recovered(event.kind, event.name, event.time_s, event.incarnation)
            elif event.what is What.GIVEN_UP:
                self.given_up(event.kind, event.name, event.cause, event.time_s)

    def take_metrics(self) -> dict[str, float]:
        """See `Health.take_metrics`."""
        with self._lock:
            return self._health.take_metrics()

    def _tell(self) -> None:
        # Again after the release: somebody may have come too late for this round and too early for the lock.
        while self._untold and self._telling.acquire(blocking=False):
            try:
                while self._untold:
                    event = self._untold.popleft()
                    self._record(event)
                    if event.what is not What.RESTARTED:
                        self._told(str(event))
            finally:
                self._telling.release()
