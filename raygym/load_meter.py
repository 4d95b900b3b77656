"""An engine's load from what its steps report. Pure: the engine's own statistics come as numbers."""

from __future__ import annotations

import time
from collections.abc import Callable

from raygym.types import EngineLoad


class LoadMeter:
    """Keeps the last report of each scheduler of an engine, and counts preemptions.

    A pause for new weights empties the KV cache, so each request of the batch is preempted and waits when the engine
    goes on. That is no want of room: the next preemption that is reported of each such request is not counted, and
    until then, or until nothing waits any more, it is not among the waiting ones.

    `unfinished` is in all calls what the engine has in hand by its front's own count. Reports come with steps only:
    after the last request was cancelled there is none.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Nothing runs yet. `clock`: seconds since the epoch."""
        self._clock = clock
        self.first_token_at: float | None = None
        """When the first step with a generated token was reported, by the clock."""
        self._running: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._kv_cache_usage: dict[int, float] = {}
        self._preemptions = self._frozen = self._put_back = 0
        self._goes_on = True

    def stepped(self, scheduler: int, running: int, waiting: int, kv_cache_usage: float) -> None:
        """One scheduler's numbers after a step."""
        self._running[scheduler], self._waiting[scheduler] = running, waiting
        self._kv_cache_usage[scheduler] = kv_cache_usage
        # A report of the last step before a pause may come late.
        if self._goes_on and not any(self._waiting.values()):
            self._put_back = 0  # all are in the batch again, or were cancelled

    def generated(self, tokens: int) -> None:
        """So many tokens were made by a step."""
        if self.first_token_at is None and tokens:
            self.first_token_at = self._clock()

    def preempted(self, requests: int) -> None:
        """So many were preempted; told of each when it has its next token."""
        frozen = min(self._frozen, requests)
        self._frozen -= frozen
        self._put_back = max(0, self._put_back - frozen)
        self._preemptions += requests - frozen

    def paused(self, unfinished: int) -> None:
        """The batch was given up for new weights."""
        # What an earlier pause left over are requests that were cancelled.
        self._frozen = self._put_back = min(sum(self._running.values()), unfinished)
        self._goes_on = False

    def resumed(self, unfinished: int) -> None:
        """It goes on; what was cancelled meanwhile never reports."""
        self._frozen = self._put_back = min(self._frozen, unfinished)
        self._goes_on = True

    def load(self, unfinished: int) -> EngineLoad:
        """The load now."""
        running = min(sum(self._running.values()), unfinished)
        waiting = max(0, sum(self._waiting.values()) - self._put_back)
        usage = max(self._kv_cache_usage.values(), default=0.0) if running else 0.0
        return EngineLoad(running, min(waiting, unfinished - running), self._preemptions, usage)
