"""What becomes of the generations that run in an engine when its weights are replaced.

`keep`: nothing here; the engine freezes them, and they go on with the new weights.
`finish_turn`: new ones wait at a gate until those that run have ended and the weights are new.
`restart_turn`: those that run are cancelled in the engine and start again behind the gate. Their callers do not see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from raygym.engine import EngineError

OnUpdate = Literal["keep", "finish_turn", "restart_turn"]
T = TypeVar("T")


@dataclass(slots=True)
class Update:
    """What one update did to generations."""

    restarted: int = 0
    """Begun again from their first token."""
    late: int = 0
    """Waited for in vain: they were frozen in the engine, as with `keep`."""


@dataclass(slots=True, eq=False)
class _Running:
    restartable: bool
    cancels: int
    """`Task.cancelling()` when it began: what is above it are cancels of its caller, and ours."""
    cancelled_by: Update | None = None


class InFlight:
    """The generations of one engine, and the gate before them. Used from one event loop.

    A generation runs in its caller's task, so that one which no update meets costs a few microseconds. To stop one, the
    task is cancelled, and the cancel is taken back where it arrives, as `asyncio.timeout` does.
    """

    def __init__(self) -> None:
        """The gate is open."""
        self._running: dict[asyncio.Task[Any], _Running] = {}
        self._awaited: set[asyncio.Task[Any]] = set()
        self._all_left = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._updating = False
        self._failure: BaseException | None = None

    async def run(self, generate: Callable[[], Awaitable[T]], *, restartable: bool = True) -> T:
        """What `generate()` returns, asked behind the gate, and again where `restart_turn` stopped it.

        Args:
            generate: one generation, made anew by each call. When it is cancelled, its request leaves the engine.
            restartable: False for one that cannot begin again; `restart_turn` leaves it to the engine, as `keep` does.

        Raises:
            EngineError: an update failed, so that the engine's weights are unusable.
        """
        task = asyncio.current_task()
        assert task is not None
        while True:
            while not self._open.is_set():  # it may close again before this task's turn comes
                await self._open.wait()
            if self._failure is not None:
                problem = f"{type(self._failure).__name__}: {self._failure}"
                raise EngineError(
                    f"this engine's weights are unusable, since their update failed ({problem})"
                ) from self._failure
            running = self._running[task] = _Running(restartable, task.cancelling())
            try:
                result = await generate()
            except (asyncio.CancelledError, Exception):
                if running.cancelled_by is None or task.uncancel() > running.cancels:
                    raise
                running.cancelled_by.restarted += 1
            else:
                if running.cancelled_by is not None:
                    task.uncancel()  # it would not be stopped, and is whole
                return result
            finally:
                del self._running[task]
                if self._awaited:
                    self._awaited.discard(task)
                    if not self._awaited:
                        self._all_left.set()

    @asynccontextmanager
    async def updating(self, on_update: OnUpdate, finish_timeout_s: float) -> AsyncIterator[Update]:
        """Inside it, the engine may be paused and given new weights.

        An error on the way in leaves everything as it was. One inside means that the weights may be half replaced: all
        generations then fail, those that run and those to come.

        Args:
            on_update: see the module.
            finish_timeout_s: how long `finish_turn` waits for those that run, and `restart_turn` for the engine to let
                go of them.

        Raises:
            EngineError: another update is not over yet.
        """
        if self._updating:
            raise EngineError("new weights came while the update before was not over; publish one version at a time")
        self._updating, update = True, Update()
        try:
            if on_update != "keep":
                self._open.clear()
                if on_update == "restart_turn":
                    self._cancel(update, everything=False)
                # A kept one is no reason to wait: it stays in the engine.
                update.late = await self._leave(on_update == "finish_turn", finish_timeout_s)
            try:
                yield update
            except BaseException as error:
                self._failure = error
                self._cancel(Update(), everything=True)
                raise
        finally:
            self._open.set()
            self._updating = False

    def _cancel(self, update: Update, *, everything: bool) -> None:
        for task, running in self._running.items():
            # One that is cancelled already is on its way out: a second cancel would only disturb its cleaning up.
            if task.cancelling() == running.cancels and (running.restartable or everything):
                running.cancelled_by = update
                task.cancel()

    async def _leave(self, everything: bool, timeout_s: float) -> int:
        """Wait until the generations of now have left the engine, at most so long. How many have not."""
        self._awaited = {task for task, running in self._running.items() if running.restartable or everything}
        if self._awaited:
            self._all_left.clear()
            with suppress(TimeoutError):  # those that are late are counted
                async with asyncio.timeout(timeout_s):
                    await self._all_left.wait()
        late, self._awaited = len(self._awaited), set()
        return late
