"""How long everything took that somebody waited for, written down as it ends, by processes that may be killed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raygym.actors.rollout_manager import RolloutManager
from raygym.actors.turn_exchange import TurnExchange
from raygym.schedule import Assignment
from raygym.types import EpisodeFailure, Generation, Int32Array, Sampling, Trajectory


@dataclass(frozen=True, slots=True)
class Wait:
    """One that ended, well or not. A process that was killed leaves those that it still waited for unwritten."""

    what: str
    """`turn` or `attempt`."""
    seconds: float
    outcome: str
    """Empty where it went well, else the kind of failure; `cancelled` too when its caller gave up."""
    group_id: str = ""
    episode: int = -1
    attempt: int = -1


class WaitLog:
    """A file that any number of processes append lines to."""

    def __init__(self, path: str) -> None:
        """Created with the first line."""
        self._path = path

    @contextmanager
    def wait(self, what: str, **identity: Any) -> Iterator[list[str]]:
        """Time the block; its outcome is what it puts into the list, or the failure that it raises."""
        outcome = [""]
        started = time.monotonic()
        try:
            yield outcome
        except EpisodeFailure as failure:
            outcome[0] = str(failure.kind)
            raise
        except BaseException as error:
            outcome[0] = "cancelled" if type(error).__name__ == "CancelledError" else type(error).__name__
            raise
        finally:
            wait = Wait(what, time.monotonic() - started, outcome[0], **identity)
            # One write of a short line: those of other processes come before or after it.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, f"{json.dumps(asdict(wait))}\n".encode())
            finally:
                os.close(file)

    def read(self) -> list[Wait]:
        """All that was written."""
        path = Path(self._path)
        return [Wait(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


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


def longest_s(waits: Sequence[Wait], what: str) -> float:
    """The longest wait of a kind."""
    return max((wait.seconds for wait in waits if wait.what == what), default=0.0)
