"""How many episodes may run at once: additive increase, multiplicative decrease on the engines' own signals. Pure.

An engine that has more requests than it can batch lets them wait, and one that has more tokens than its KV cache holds
preempts requests, whose work is then done twice. Either says that too many episodes run. As long as neither happens
and every place is used, there may be more. Until the first such sign the number doubles, as TCP's slow start does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from raygym.types import EngineLoad

_LONG_QUEUE = 0.1
"""Requests waiting in the engines, as a share of those running: above it, fewer episodes may run ..."""
_EMPTY_QUEUE = 0.02
"""... and up to this share the queue counts as empty. In between, it keeps the engines' batches full."""
_NEARLY_FULL_CACHE = 0.9
"""Share of a KV cache in use from which on nothing is added: histories still grow."""
_DECREASE = 0.75
_STEPS_UP = 16
"""Increases from the number at the last decrease to twice that."""
_FIRST_REACTION_S = 5.0
"""Taken for a turn while no episode has ended yet."""
_MIN_REACTION_S, _MAX_REACTION_S = 1.0, 60.0
_TURN_MEMORY = 0.05
"""Weight of the latest episode in the mean time of a turn."""


class AdaptiveConcurrency:
    """The limit on episodes that run at once, moved by what the engines say.

    After each change one turn passes before the next increase or the next decrease: earlier, the engines show what was
    before. A lower limit ends no episode, so the next decrease also waits until as many have ended on their own.
    """

    def __init__(self, least: int, most: int, clock: Callable[[], float]) -> None:
        """Begins with `least`.

        Args:
            least: the limit never falls below it, at least 1.
            most: nor rises above it.
            clock: seconds, monotonic.
        """
        assert 1 <= least <= most, (least, most)
        self._least, self._most, self._clock = least, most, clock
        self._limit = least
        self._doubling = True
        self._knee = least
        self._to_end = 0
        self._changed_s = self._lowered_s = clock()
        self._queue_was_long = False
        self._preemptions: dict[str, int] = {}
        self._turn_s: float | None = None
        self._seen_sum = self._seen = 0

    @property
    def limit(self) -> int:
        """Episodes that may run at once now."""
        return self._limit

    @property
    def reaction_s(self) -> float:
        """Seconds until a change shows in the engines: about one turn."""
        turn_s = _FIRST_REACTION_S if self._turn_s is None else self._turn_s
        return min(max(turn_s, _MIN_REACTION_S), _MAX_REACTION_S)

    def episode_ended(self, turns: int = 0, seconds: float = 0.0) -> None:
        """An episode has left its place, however it ended.

        Args:
            turns: how many it had; 0 where that is not known.
            seconds: all of them together, generation and environment.
        """
        self._to_end = max(0, self._to_end - 1)
        if turns:
            turn_s = seconds / turns
            self._turn_s = turn_s if self._turn_s is None else self._turn_s + _TURN_MEMORY * (turn_s - self._turn_s)

    def observe(self, loads: Mapping[str, EngineLoad], episodes: int) -> int:
        """Take one observation into account; about once a second. Returns the limit from now on.

        Args:
            loads: what the replicas that answered say, by their names. Without any, nothing changes.
            episodes: how many run or wait for a place. Without any, nothing changes: it is not their load.
        """
        if loads:
            self._consider(loads, episodes)
        self._seen_sum += self._limit
        self._seen += 1
        return self._limit

    def take_mean(self) -> float:
        """Mean limit over the observations since the last call; the limit itself when there was none."""
        mean = self._seen_sum / self._seen if self._seen else float(self._limit)
        self._seen_sum = self._seen = 0
        return mean

    def _consider(self, loads: Mapping[str, EngineLoad], episodes: int) -> None:
        preempted = self._preempted_since(loads)
        # An engine that runs nothing is paused or has just begun: that requests wait there says nothing.
        busy = [load for load in loads.values() if load.running]
        running, waiting = sum(load.running for load in busy), sum(load.waiting for load in busy)
        # One request that waits for the next batch is no queue, however few run.
        queue_is_long = waiting > max(1.0, _LONG_QUEUE * running)
        # New requests wait for the engine's next step, so that one observation may be by chance.
        congested = preempted or (queue_is_long and self._queue_was_long)
        self._queue_was_long = queue_is_long
        if episodes <= self._limit:
            self._to_end = 0
        since_s = self._clock() - self._changed_s
        if congested:
            if episodes and not self._to_end and self._clock() - self._lowered_s >= self.reaction_s:
                self._decrease(min(episodes, self._limit))
        elif running and not queue_is_long and episodes >= self._limit and since_s >= self.reaction_s:
            full = max(load.kv_cache_usage for load in busy) >= _NEARLY_FULL_CACHE
            if full or waiting > _EMPTY_QUEUE * running:
                self._end_doubling()
            else:
                self._increase()

    def _preempted_since(self, loads: Mapping[str, EngineLoad]) -> bool:
        before, self._preemptions = self._preemptions, {name: load.preemptions for name, load in loads.items()}
        # A lower count is that of an engine that started anew. A replica not seen before tells of times unknown.
        return any(count not in (0, before[name]) for name, count in self._preemptions.items() if name in before)

    def _decrease(self, used: int) -> None:
        """By a share of what was used: places that nobody had did no harm."""
        lower = max(self._least, math.floor(_DECREASE * used))
        self._to_end = max(0, used - lower)
        self._doubling, self._knee = False, lower
        self._changed_s = self._lowered_s = self._clock()
        self._queue_was_long = False
        self._limit = min(self._limit, lower)

    def _end_doubling(self) -> None:
        if self._doubling:
            self._doubling, self._knee = False, self._limit

    def _increase(self) -> None:
        if self._limit >= 2 * self._knee:  # far above the last congestion, steps that suit it are too small
            self._knee = self._limit
        step = self._limit if self._doubling else math.ceil(self._knee / _STEPS_UP)
        self._limit = min(self._most, self._limit + step)
        self._changed_s = self._clock()
