"""The RolloutManager as its driver sees it: when it dies or hangs, a new one goes on from the last collection."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from raygym.actors.ray_errors import cause
from raygym.actors.supervisor import Supervisor
from raygym.rollout_state import RolloutState
from raygym.schedule import Collected, RolloutStopped, SchedulerState
from raygym.supervision import GivenUp, Kind

logger = logging.getLogger(__name__)
_HEARTBEAT_S = 2.0
ANSWER_TIMEOUT_S = 60.0
# Until a manager's first answer, instead: its process has to start.
START_TIMEOUT_S = 600.0
_NAME = "the RolloutManager"
# The manager's process is gone, it hangs, or its answer went with its node.
_LOST = (RayActorError, ObjectLostError, GetTimeoutError)


class KeptManager:
    """One RolloutManager after the other, each with what its predecessor's last collection left to do.

    Only the steps that were collected are known of a manager that died: everything else is played again. So nothing
    that the run has seen comes twice, and nothing is skipped. A collection and a validation may wait at the same time,
    each in a thread of its own; both are asked for again.
    """

    def __init__(
        self,
        start: Callable[[SchedulerState], Any],
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        state: SchedulerState | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        """Start the first one; returns before it is up.

        Args:
            start: makes a RolloutManager actor that goes on from a state.
            answer_timeout_s: a manager that does not say for so long that it is alive is replaced.
            state: from which the first one goes on.
            supervisor: is told what is lost, and says when it was too often.
        """
        self._start = start
        self._answer_timeout_s = answer_timeout_s
        self._state = state or SchedulerState()
        self._version = self._state.version
        self._restarts = 0
        self._supervisor = supervisor or Supervisor()
        # Guards all of the above, and which manager is in charge.
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)
        self._calls = 0
        self._closed = False
        self._manager = start(self._state)
        self._answers = False

    def wait_ready(self, timeout_s: float) -> None:
        """Block until the manager answers. Raises Ray's GetTimeoutError when it is not up in time."""
        self._heard(self._manager, [self._manager.progress.remote()], timeout_s)

    @property
    def manager(self) -> Any:
        """The actor that is in charge now."""
        return self._manager

    @property
    def restarts(self) -> int:
        """How many managers of the run were lost or left before the one that is in charge."""
        return self._state.restarts

    def collect(self, step: int, progress: Callable[[str], None]) -> Collected:
        """The whole groups of `step`.

        Raises:
            RolloutStopped: they cannot be had, or too many managers in a row were lost.
            GivenUp: another part that the manager watches was lost more often than the config allows.
            Exception: whatever `progress` raises.
        """
        while True:
            manager, collected = self._answered("collect", lambda: (step,), progress)
            assert isinstance(collected, Collected)
            with self._lock:
                # One that was found lost meanwhile has a successor, which plays this step again.
                if manager is self._manager:
                    self._state = collected.state
                    restarts, self._restarts = self._restarts, 0
                    self._works(collected)
                    return replace(collected, manager_restarts=restarts)

    def validate(
        self, tasks: list[Any], progress: Callable[[str], None], deadline_s: float = math.inf
    ) -> tuple[Collected, float]:
        """One episode of each task that can be played in time, and how long that took in seconds.

        Raises as `collect` does. What a validation says of the training is not the newest, and not kept.
        """
        began = time.monotonic()

        def arguments() -> tuple[Any, ...]:
            return tasks, max(0.0, began + deadline_s - time.monotonic())

        _, collected = self._answered("validate", arguments, progress)
        assert isinstance(collected, Collected)
        self._works(collected)
        return collected, time.monotonic() - began

    def snapshot(self) -> RolloutState:
        """Where the rollouts stand: after the last collection, whatever was lost since. Raises as `collect` does."""
        _, state = self._answered("snapshot", tuple, lambda _: None)
        assert isinstance(state, RolloutState)
        return state

    def set_version(self, version: int) -> None:
        """Tell the manager, and those after it, which version the engines serve."""
        with self._lock:
            self._version, manager = version, self._manager
        try:
            self._heard(manager, [manager.set_version.remote(version)])
        except _LOST as error:
            self._replace(manager, error)

    def close(self) -> None:
        """End the manager. Whoever still waits for it gets a RolloutStopped, and has left when this returns."""
        with self._lock:
            self._closed = True
            with suppress(RayActorError):  # it is already dead, which is what is wanted
                ray.kill(self._manager)
            if not self._left.wait_for(lambda: self._calls == 0, self._answer_timeout_s):
                logger.warning("%d calls to the RolloutManager have not ended", self._calls)

    def _answered(
        self, method: str, arguments: Callable[[], tuple[Any, ...]], progress: Callable[[str], None]
    ) -> tuple[Any, Any]:
        """The manager that answered, and its answer."""
        with self._counted():
            while True:
                with self._lock:
                    self._check_open()
                    manager = self._manager
                    reference = getattr(manager, method).remote(*arguments())
                try:
                    return manager, self._watch(manager, reference, progress)
                except _LOST as error:
                    self._replace(manager, error)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._left.notify_all()

    def _watch(self, manager: Any, reference: Any, progress: Callable[[str], None]) -> Any:
        # Episodes keep their own deadlines, so the wait itself needs none; that the manager answers is checked instead.
        started = time.monotonic()
        while not ray.wait([reference], timeout=_HEARTBEAT_S)[0]:
            asked = [manager.progress.remote(), manager.take_part_events.remote()]
            text, events = self._heard(manager, asked)
            self._supervisor.relay(events)
            progress(f"{text}, {time.monotonic() - started:.0f} s")
        return answer(reference, self._answer_timeout_s)

    def _heard(self, manager: Any, asked: list[Any], timeout_s: float | None = None) -> list[Any]:
        """The answers of a manager that is alive. Raises what says that it is not."""
        answers: list[Any] = ray.get(asked, timeout=self._patience_s() if timeout_s is None else timeout_s)
        with self._lock:
            self._answers = self._answers or manager is self._manager
        return answers

    def _patience_s(self) -> float:
        return self._answer_timeout_s if self._answers else START_TIMEOUT_S

    def _works(self, collected: Collected) -> None:
        self._supervisor.recovered(Kind.MANAGER, _NAME)
        self._supervisor.progressed(Kind.MANAGER)
        self._supervisor.relay(collected.part_events)

    def _replace(self, lost: Any, error: RayError) -> None:
        with self._lock:
            why = _cause(error, self._patience_s())
            self._check_open()
            if lost is not self._manager:
                return  # the other call has noticed as well, and was first
            try:
                self._supervisor.lost(Kind.MANAGER, _NAME, f"the RolloutManager: {why}")
            except GivenUp as given_up:
                raise RolloutStopped(
                    f"{given_up} without a step or validation collected in between; its log is in Ray's session "
                    "directory"
                ) from None
            self._restarts += 1
            logger.warning("The RolloutManager is replaced: %s", why)
            ray.kill(lost)  # one that hangs must not go on beside its successor
            self._state = self._state.successor(self._version)
            self._manager = self._start(self._state)
            self._answers = False

    def _check_open(self) -> None:
        if self._closed:
            raise RolloutStopped("the run is being ended")


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
    return cause(error)
