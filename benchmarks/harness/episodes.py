"""Episodes of a scheduler in this process, started as places become free, or at the next wake-up of a loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from raygym.schedule import Assignment, Scheduler
from raygym.types import Group, Trajectory


@dataclass(frozen=True, slots=True)
class Step:
    """One step's batch."""

    groups: tuple[Group, ...]
    seconds: float
    """Since the step before."""


class Episodes:
    """Used from one event loop."""

    def __init__(
        self, scheduler: Scheduler, episode: Callable[[Assignment], Awaitable[Trajectory]], wake_s: float
    ) -> None:
        """Nothing is started yet.

        Args:
            scheduler: what may run.
            episode: plays one; it is called when the episode begins.
            wake_s: how often a loop starts what may run, in seconds; 0: at once, whenever an episode ends.
        """
        self._scheduler = scheduler
        self._episode = episode
        self._wake_s = wake_s
        self._playing: set[asyncio.Task[None]] = set()
        self._waking: asyncio.Task[None] | None = None
        self._ending = False
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._stepped_s = time.perf_counter()

    async def step(self, number: int) -> Step:
        """Serve the version of this number, and wait for the groups of its step."""
        self._scheduler.set_version(number)
        if not self._wake_s:
            self._fill()
        elif self._waking is None:
            self._waking = asyncio.create_task(self._keep_waking())
        while (collected := self._scheduler.collect_step(number)) is None:
            self._changed.clear()
            await self._changed.wait()
            if self._error is not None:
                raise self._error
        before, self._stepped_s = self._stepped_s, time.perf_counter()
        return Step(collected.groups, self._stepped_s - before)

    async def end(self, *, cancel: bool) -> None:
        """No episode starts any more; wait for those that play, or cancel them."""
        self._ending = True
        tasks = {*self._playing, *({self._waking} if self._waking else ())}
        if cancel:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fill(self) -> None:
        if self._ending:
            return
        for assignment in self._scheduler.start():
            task = asyncio.ensure_future(self._play(assignment, self._episode(assignment)))
            self._playing.add(task)
            task.add_done_callback(self._playing.discard)

    async def _play(self, assignment: Assignment, episode: Awaitable[Trajectory]) -> None:
        try:
            self._scheduler.finish(assignment, await episode)
            if not self._wake_s:
                self._fill()
        except Exception as error:  # whoever waits for the step is told
            self._error = error
        self._changed.set()

    async def _keep_waking(self) -> None:
        while True:
            self._fill()
            await asyncio.sleep(self._wake_s)
