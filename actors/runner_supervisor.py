"""Watches the EnvRunners for the RolloutManager: which are up, and when one that died or hangs may be used again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from raygym.backoff import Backoff
from raygym.env_host import DeadlineMissed, within
from raygym.supervision import Kind, PartEvent, What

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Supervision:
    """How closely runners are watched."""

    ping_every_s: float = 10.0
    ping_timeout_s: float = 60.0
    start_timeout_s: float = 600.0
    """That one which is down has to answer again: it loads its tokenizer and environments."""
    first_wait_s: float = 0.5
    """Before a runner that is down is asked again; twice as long each time, up to half a minute."""
    given_up_after: int = 8
    """Failures in a row, without an answer in between."""


class RunnersLost(RuntimeError):
    """No EnvRunner is left. The text says what the last of them died of."""


class RunnerSupervisor:
    """Hands out the least loaded runner that is up. Ray restarts one that died; this notices when it answers again."""

    def __init__(self, runners: Sequence[Any], supervision: Supervision) -> None:
        """Watch `runners`, which are taken to be up."""
        self._supervision = supervision
        self._runners = list(runners)
        self._load = [0] * len(runners)
        self._up = [asyncio.Event() for _ in runners]
        self._wake = [asyncio.Event() for _ in runners]
        self._backoff = [Backoff(supervision.first_wait_s, most_s=30.0) for _ in runners]
        self._changed = asyncio.Condition()
        self._last_error = ""
        # Of one that was lost under an earlier manager, that it answers now has to be told.
        self._answered = [False] * len(runners)
        self._events: list[PartEvent] = []
        for up in self._up:
            up.set()
        self._watchers = [asyncio.ensure_future(self._watch(index)) for index in range(len(runners))]

    async def take(self) -> int:
        """The number of the least loaded runner that is up; waits for one. Give it back with `release`.

        Raises:
            RunnersLost: all were given up.
        """
        while True:
            candidates = [index for index, up in enumerate(self._up) if up.is_set()]
            if candidates:
                index = min(candidates, key=self._load.__getitem__)
                self._load[index] += 1
                return index
            if all(watcher.done() for watcher in self._watchers):
                raise RunnersLost(
                    f"all EnvRunners were given up ({len(self._runners)}); last error: {self._last_error}"
                )
            async with self._changed:
                await self._changed.wait()

    @property
    def up(self) -> int:
        """How many runners answer; at least 1, since one more may come back."""
        return max(1, sum(self.states()))

    def runner(self, index: int) -> Any:
        """The actor of that number."""
        return self._runners[index]

    def release(self, index: int) -> None:
        """One episode of this runner is over."""
        self._load[index] -= 1

    def lost(self, index: int, error: BaseException) -> None:
        """A call to this runner said that it is dead: it gets nothing until it answers again."""
        if self._up[index].is_set():
            self._note(index, error)

    def states(self) -> list[bool]:
        """Which runners are up."""
        return [up.is_set() for up in self._up]

    def take_events(self) -> tuple[PartEvent, ...]:
        """What became of runners since the last call. Each is `recovered` when it answers for the first time."""
        events, self._events = self._events, []
        return tuple(events)

    def _event(self, index: int, what: What, cause: str = "", incarnation: str = "") -> None:
        name = f"EnvRunner {index}"
        self._events.append(PartEvent(time.time(), Kind.ENV_RUNNER, name, what, cause, incarnation=incarnation))

    def _note(self, index: int, error: BaseException) -> None:
        self._last_error = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning("EnvRunner %d is down: %s", index, self._last_error)
        if self._up[index].is_set():
            self._event(index, What.LOST, self._last_error)
        self._up[index].clear()
        self._backoff[index].failed()
        self._wake[index].set()

    async def _watch(self, index: int) -> None:
        while self._backoff[index].failures < self._supervision.given_up_after:
            self._wake[index].clear()
            if not self._up[index].is_set():
                await asyncio.sleep(self._backoff[index].wait_s())
            elif self._answered[index]:  # the first ping goes out at once: it tells which process is there
                with suppress(TimeoutError):  # a call that finds the runner dead ends the pause early
                    await asyncio.wait_for(self._wake[index].wait(), self._supervision.ping_every_s)
                    continue
            await self._ping(index)
        logger.error("EnvRunner %d is given up: %s", index, self._last_error)
        self._event(index, What.GIVEN_UP, self._last_error)
        await self._tell()

    async def _ping(self, index: int) -> None:
        # One that starts does not hang. Were it killed for that, it would never be up where starting takes long.
        starts = not self._up[index].is_set()
        timeout_s = self._supervision.start_timeout_s if starts else self._supervision.ping_timeout_s
        try:
            reference = self._runners[index].ping.remote()
            incarnation = await within(asyncio.wrap_future(reference.future()), timeout_s)
        except DeadlineMissed:
            self._note(index, TimeoutError(f"no answer within {timeout_s:.0f} s"))
            # It hangs: Ray starts it anew, and its callers are told that it died.
            ray.kill(self._runners[index], no_restart=False)
        except RayActorError as error:
            self._note(index, error)
        except RayError as error:
            logger.warning("EnvRunner %d: %s", index, error)
        else:
            self._backoff[index].succeeded()
            if not (self._answered[index] and self._up[index].is_set()):
                self._event(index, What.RECOVERED, incarnation=incarnation)
            self._answered[index] = True
            if not self._up[index].is_set():
                logger.warning("EnvRunner %d is up again", index)
                self._up[index].set()
                await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
