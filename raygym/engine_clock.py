"""The simulated engine's time: it stands still while the engine is paused, and knows which weights were in use when."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import numpy as np

from raygym.types import Int32Array

# Of uvloop, on which Ray's actors run: its clock stands still for so long, and its timers do not know of less. Whoever
# slept for the rest of a millisecond would only keep the loop busy.
_RESOLUTION_S = 1e-3


class Moment(NamedTuple):
    """A time of an `EngineClock`."""

    seconds: float
    changes: int
    """How often the weights had been changed."""


class EngineClock:
    """Seconds of the event loop, without the pauses. Used from one event loop."""

    def __init__(self) -> None:
        """Running, with version 0."""
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._stopped_s = 0.0
        self._paused_at_s = 0.0
        self._changed_s: list[float] = []
        self._versions = [0]

    def time(self) -> float:
        """Seconds, of an arbitrary beginning, in which the engine worked."""
        running = self._resumed.is_set()
        return (asyncio.get_running_loop().time() if running else self._paused_at_s) - self._stopped_s

    def now(self) -> Moment:
        """This moment."""
        return Moment(self.time(), len(self._changed_s))

    def pause(self) -> None:
        """Stop; twice is harmless."""
        if self._resumed.is_set():
            self._paused_at_s = asyncio.get_running_loop().time()
            self._resumed.clear()

    def resume(self) -> None:
        """Go on."""
        if not self._resumed.is_set():
            self._stopped_s += asyncio.get_running_loop().time() - self._paused_at_s
            self._resumed.set()

    async def wait_running(self) -> None:
        """Returns at once unless paused."""
        if not self._resumed.is_set():
            await self._resumed.wait()

    async def sleep(self, seconds: float) -> None:
        """Until so many seconds have passed on this clock."""
        ends = self.time() + seconds
        # Timers do not know of pauses: one that fires during or after a pause finds that some of its time is left.
        left = seconds
        while left > _RESOLUTION_S:
            await asyncio.sleep(left)
            await self.wait_running()
            left = ends - self.time()

    def changed(self, version: int) -> None:
        """From now on these weights are in use."""
        self._changed_s.append(self.time())
        self._versions.append(version)

    def versions(self, started: Moment, seconds: float, count: int) -> Int32Array:
        """The weights that made each of `count` tokens, made at equal intervals in the `seconds` after `started`."""
        if started.changes == len(self._changed_s):
            return np.full(count, self._versions[-1], np.int32)
        made_s = started.seconds + seconds * np.arange(1, count + 1) / count
        # On the left: a token that was made at the very moment of a change was made before it.
        changes = np.searchsorted(self._changed_s, made_s, side="left")
        return np.take(np.asarray(self._versions, np.int32), np.maximum(changes, started.changes))
