"""A run's own way to the engines and its own RolloutManager, with all that they wait for written down."""

from __future__ import annotations

import asyncio
from typing import Any

from harness.waits import WaitLog
from raygym.actors.rollout_manager import RolloutManager
from raygym.actors.turn_exchange import TurnExchange
from raygym.schedule import Assignment
from raygym.types import EpisodeFailure, Generation, Int32Array, Sampling, Trajectory


class TimedTurns:
    """The runs' own way to the engines, with each turn's time written down."""

    def __init__(self, deployment: str, app: str, log: str) -> None:
        """`log` is the path of a WaitLog."""
        self._exchange = TurnExchange(deployment, app)
        self._log = WaitLog(log)
        self.loop: asyncio.AbstractEventLoop | None = None
        """Of the EnvRunner, from its first turn on."""

    async def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        """See `TurnExchange`."""
        self.loop = asyncio.get_running_loop()
        with self._log.wait("turn"):
            return await self._exchange(prompt_token_ids, sampling, session_id)


class TimedManager(RolloutManager):
    """The runs' own RolloutManager, with the time of each call to an EnvRunner written down."""

    def __init__(self, log: str, *args: Any, **kwargs: Any) -> None:
        """`log` is the path of a WaitLog; all others are RolloutManager's."""
        super().__init__(*args, **kwargs)
        self._log = WaitLog(log)

    async def _call(self, assignment: Assignment) -> Trajectory | EpisodeFailure:
        names = {"group_id": assignment.group_id, "episode": assignment.episode, "attempt": assignment.attempt}
        with self._log.wait("attempt", **names) as outcome:
            result = await super()._call(assignment)
            failure = result.kind if isinstance(result, EpisodeFailure) else result.failure
            outcome[0] = str(failure or "")
            return result
