"""The RolloutManager as its driver sees it: when it dies or hangs, a new one goes on from the last collection."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from raygym.schedule import Collected, RolloutStopped, SchedulerState

logger = logging.getLogger(__name__)
_HEARTBEAT_S = 2.0
ANSWER_TIMEOUT_S = 60.0
_RESTARTS_IN_A_ROW = 3
# The manager's process is gone, it hangs, or its answer went with its node.
_LOST = (RayActorError, ObjectLostError, GetTimeoutError)


class KeptManager:
    """One RolloutManager after the other, each with what its predecessor's last collection left to do.

    Only what was collected is known of a manager that died: everything else is played again. So nothing that the run
    has seen comes twice, and nothing is skipped. One collection or validation at a time.
    """

    def __init__(self, start: Callable[[SchedulerState], Any], answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Start the first one; returns before it is up.

        Args:
            start: makes a RolloutManager actor that goes on from a state.
            answer_timeout_s: a manager that does not say for so long that it is alive is replaced.
        """
        self._start = start
        self._answer_timeout_s = answer_timeout_s
        self._state = SchedulerState()
        self._version = 0
        self._restarts = self._in_a_row = 0
        self._manager = start(self._state)

    @property
    def manager(self) -> Any:
        """The actor that is in charge now."""
        return self._manager

    def collect(self, step: int, progress: Callable[[str], None]) -> Collected:
        """The whole groups of `step`.

        Raises:
            RolloutStopped: they cannot be had, or too many managers in a row were lost.
        """
        return self._collected("collect", step, progress=progress)

    def validate(self, tasks: list[Any], progress: Callable[[str], None]) -> Collected:
        """One episode of each task; raises as `collect` does."""
        return self._collected("validate", tasks, progress=progress)

    def set_version(self, version: int) -> None:
        """Tell the manager, and those after it, which version the engines serve."""
        self._version = version
        try:
            ray.get(self._manager.set_version.remote(version), timeout=self._answer_timeout_s)
        except _LOST as error:
            self._replace(error)

    def _collected(self, method: str, *args: Any, progress: Callable[[str], None]) -> Collected:
        while True:
            try:
                collected = self._watch(getattr(self._manager, method).remote(*args), progress)
            except _LOST as error:
                self._replace(error)
                continue
            self._state, self._in_a_row = collected.state, 0
            restarts, self._restarts = self._restarts, 0
            return replace(collected, manager_restarts=restarts)

    def _watch(self, reference: Any, progress: Callable[[str], None]) -> Collected:
        # Episodes keep their own deadlines, so the wait itself needs none; that the manager answers is checked instead.
        started = time.monotonic()
        while not ray.wait([reference], timeout=_HEARTBEAT_S)[0]:
            text = ray.get(self._manager.progress.remote(), timeout=self._answer_timeout_s)
            progress(f"{text}, {time.monotonic() - started:.0f} s")
        collected: Collected = answer(reference, self._answer_timeout_s)
        return collected

    def _replace(self, error: RayError) -> None:
        cause = _cause(error, self._answer_timeout_s)
        if self._in_a_row == _RESTARTS_IN_A_ROW:
            raise RolloutStopped(
                f"the RolloutManager was lost {self._in_a_row + 1} times without a step or validation collected in "
                f"between; the last time: {cause}. Its log is in Ray's session directory"
            ) from error
        self._in_a_row += 1
        self._restarts += 1
        logger.warning("The RolloutManager is replaced (%d in a row): %s", self._in_a_row, cause)
        ray.kill(self._manager)  # one that hangs must not go on beside its successor
        self._state = self._state.successor(self._version)
        self._manager = self._start(self._state)


def answer(reference: Any, timeout_s: float) -> Any:
    """What a call to a RolloutManager gave, with its RolloutStopped as itself. Raises Ray's errors otherwise."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RolloutStopped):
            raise RolloutStopped(*error.cause.args) from None
        raise


def _cause(error: RayError, timeout_s: float) -> str:
    if isinstance(error, GetTimeoutError):
        return f"no answer within {timeout_s:g} s"
    # Ray's text has a headline, then a line for each property of the actor.
    return " ".join(str(error).split()) or type(error).__name__
