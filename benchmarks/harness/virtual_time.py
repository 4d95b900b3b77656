"""Time that only events move: what is due next happens next, however far away it is."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class VirtualTime:
    """A heap of events. Those of one moment happen in the order in which they were asked for."""

    def __init__(self) -> None:
        """Nothing is due."""
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def at(self, time_s: float, event: Callable[..., None], *args: Any) -> None:
        """Let `event(*args)` happen at `time_s`; at once, if that is past."""
        heapq.heappush(self._due, (time_s, next(self._order), event, args))

    def after(self, seconds: float, event: Callable[..., None], *args: Any) -> None:
        """The same, counted from now."""
        self.at(self.now_s + seconds, event, *args)

    def run_until(self, done: Callable[[], bool]) -> None:
        """Let events happen until `done`, which is asked after each.

        Raises:
            RuntimeError: nothing is due any more, and it is not done.
        """
        while not done():
            if not self._due:
                raise RuntimeError(f"nothing happens any more at {self.now_s:.3f} s, and what is waited for did not")
            time_s, _, event, args = heapq.heappop(self._due)
            self.now_s = max(self.now_s, time_s)
            event(*args)
