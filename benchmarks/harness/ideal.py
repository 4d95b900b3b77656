"""What a perfect scheduler would need for the very durations that the simulated engine drew."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import zip_longest


def makespan_s(durations: Sequence[float], places: int) -> float:
    """Makespan of list scheduling, longest first, on `places` machines: of a batch that starts and ends empty."""
    ends = [0.0] * places
    for duration in sorted(durations, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


def steady_s(durations: Sequence[float], places: int) -> float:
    """Seconds that `places` machines need at least for these, in a stream that always has more to start.

    `durations` are of the episodes that were delivered: what was started and thrown away is no part of the ideal, so
    that it counts against whoever started it.
    """
    return sum(durations) / places


def lock_step_s(batches: Sequence[Sequence[Sequence[float]]]) -> float:
    """Seconds for batches of episodes in lock-step: each turn takes as long as the slowest that is still in play.

    Args:
        batches: of each batch, of each episode, the seconds of its turns.
    """
    return sum(sum(map(max, zip_longest(*episodes, fillvalue=0.0))) for episodes in batches)


def whole_batches_s(batches: Sequence[Sequence[float]]) -> float:
    """Seconds for batches, given as durations of their episodes, when one begins after the slowest of the last."""
    return sum(map(max, batches))
