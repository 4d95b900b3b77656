"""How late an event loop is: what a timer that should fire now still waits behind."""

from __future__ import annotations

import asyncio
from collections import deque

import numpy as np

_EVERY_S = 0.05
_KEPT = 20_000


class LoopLag:
    """Watches the running loop from its first `start` on."""

    def __init__(self) -> None:
        self._samples_ms: deque[float] = deque(maxlen=_KEPT)
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, in the loop that is running now; twice is harmless."""
        if self._timer is None:
            self._next(asyncio.get_running_loop())

    def take(self) -> tuple[float, float]:
        """Median and 99th percentile in milliseconds since the last call; zeros without a sample."""
        samples, self._samples_ms = self._samples_ms, deque(maxlen=_KEPT)
        if not samples:
            return 0.0, 0.0
        p50, p99 = np.percentile(samples, [50, 99])
        return float(p50), float(p99)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_s = loop.time() + _EVERY_S
        self._timer = loop.call_at(self._due_s, self._fired, loop)

    def _fired(self, loop: asyncio.AbstractEventLoop) -> None:
        self._samples_ms.append((loop.time() - self._due_s) * 1000)
        self._next(loop)
