"""What a perfect scheduler would need for the very durations that the simulated engine drew."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


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
