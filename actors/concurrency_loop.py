"""Asks the replicas for their load once a second, and moves the RolloutManager's limit on episodes at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray import serve

from raygym.actors.serve_failures import replicas_that_answer
from raygym.concurrency import AdaptiveConcurrency
from raygym.types import EngineLoad

logger = logging.getLogger(__name__)
_EVERY_S = 1.0
_ANSWER_TIMEOUT_S = 5.0


class ConcurrencyLoop:
    """A control loop beside the episodes. Whatever fails in it changes nothing, and is tried again a second later."""

    def __init__(
        self,
        control: AdaptiveConcurrency,
        deployment: str,
        app: str,
        episodes: Callable[[], int],
        changed: Callable[[int], None],
    ) -> None:
        """Nothing is asked yet.

        Args:
            control: decides.
            deployment: of the policy, in the Serve application `app`.
            app: as there.
            episodes: how many run or wait for a place.
            changed: called with each new limit.
        """
        self._control = control
        self._deployment = deployment
        self._app = app
        self._episodes = episodes
        self._changed = changed
        self._handle: Any = None
        self._failed = False
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, in the event loop that is running now; twice is harmless."""
        if self._loop is None:
            self._loop = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            started_s = clock()
            try:
                await self._observe()
            except Exception as error:
                # Whatever it is: rollouts go on with the limit that they have. Said once, not every second.
                if not self._failed:
                    logger.warning("The replicas' load is not known, so concurrency stays as it is: %s", error)
                self._failed = True
            else:
                self._failed = False
            await asyncio.sleep(max(0.0, started_s + _EVERY_S - clock()))

    async def _observe(self) -> None:
        loads = await self._ask()
        before = self._control.limit
        if (limit := self._control.observe(loads, self._episodes())) != before:
            self._changed(limit)

    async def _ask(self) -> dict[str, EngineLoad]:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, self._app)
        return dict(await replicas_that_answer(self._handle, "load", _ANSWER_TIMEOUT_S))
