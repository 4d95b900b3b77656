"""The rollout side of a run, from the driver: runners, manager, and calls to it that cannot hang."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from raygym.actors.env_runner import start_env_runner
from raygym.actors.kept_manager import ANSWER_TIMEOUT_S, KeptManager, answer
from raygym.actors.policy_server import DEPLOYMENT
from raygym.actors.rollout_manager import start_manager
from raygym.actors.serving import app_name
from raygym.actors.supervisor import Supervisor
from raygym.config import RunConfig
from raygym.episode import EpisodeLimits
from raygym.rollout_state import RolloutState
from raygym.schedule import Collected, SchedulerState
from raygym.task_stream import Taken
from raygym.tracking.otlp import TracingOptions, missing_exporter
from raygym.types import Task

logger = logging.getLogger(__name__)
_FLUSH_TIMEOUT_S = 6.0


class Rollouts:
    """Owns the EnvRunners and the RolloutManager of one run."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        max_model_len: int,
        placement: Mapping[str, Any] | None = None,
        resumed: RolloutState | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        """Start them; returns before they are up.

        Args:
            config: the run's.
            model_dir: the policy's files.
            max_model_len: tokens that fit into the engine's context.
            placement: Ray's options for the EnvRunners, such as the node that their environments are on.
            resumed: where an interrupted run stood.
            supervisor: is told which managers and runners are lost.
        """
        self._config = config
        self._supervisor = supervisor
        rollout = config.rollout
        limits = EpisodeLimits.of(rollout, max_model_len)
        self._tracing = TracingOptions.of(config.name, config.logging.opentelemetry, os.environ)
        if self._tracing is not None and (missing := missing_exporter(self._tracing)):
            logger.warning("%s", missing)
            self._tracing = None
        self._runners = [
            start_env_runner(
                config.envs,
                model_dir,
                limits,
                config.seed,
                deployment=DEPLOYMENT,
                app=app_name(config.name),
                parser=config.policy.tool_parser,
                memory_mib=rollout.env_runner_memory_mib,
                tracing=self._tracing,
                max_concurrent=rollout.max_concurrent,
                **(placement or {}),
            )
            for _ in range(rollout.env_runners)
        ]

        self._manager = self._kept(resumed or RolloutState())

    def _kept(self, resumed: RolloutState) -> KeptManager:
        config = self._config

        def start(state: SchedulerState) -> Any:
            return start_manager(
                config.rollout,
                config.envs,
                config.seed,
                config.steps,
                config.validation.temperature,
                self._runners,
                state=state,
                policy=(DEPLOYMENT, app_name(config.name)),
                whole=resumed.whole,
            )

        return KeptManager(start, state=resumed.scheduler, supervisor=self._supervisor)

    def stop_playing(self) -> None:
        """End the manager; the runners stay. Whoever waits for it gets a RolloutStopped."""
        self._manager.close()

    def rewind(self, to: RolloutState) -> None:
        """After `stop_playing`: a new manager goes on from there, on the same runners, once it is told the version."""
        # The runners tell its episodes from those before by that number, and end those.
        restarts = self._manager.restarts + 1
        self._manager = self._kept(replace(to, scheduler=replace(to.scheduler, restarts=restarts)))

    def wait_ready(self, timeout_s: float) -> None:
        """Block until every runner has made its environments once.

        Raises:
            TimeoutError: a runner or the manager is not up in time.
        """
        try:
            ray.get([runner.ping.remote() for runner in self._runners], timeout=timeout_s)
            self._manager.wait_ready(timeout_s)
        except GetTimeoutError as error:
            raise TimeoutError(f"an EnvRunner or the RolloutManager was not up within {timeout_s} s") from error

    def collect(self, step: int, progress: Callable[[str], None]) -> Collected:
        """The whole groups of `step`. Raises RolloutStopped when they cannot be had."""
        return self._manager.collect(step, progress)

    def validate(
        self, tasks: Sequence[Task], progress: Callable[[str], None], deadline_s: float = math.inf
    ) -> tuple[Collected, float]:
        """One episode of each validation task, and the seconds that took; may run in a thread beside `collect`.

        Tasks that are not done after `deadline_s` are dropped. Raises RolloutStopped when it cannot go on.
        """
        return self._manager.validate(list(tasks), progress, deadline_s)

    def play(self, tasks: Sequence[Task], samples: int, most_waiting: int) -> None:
        """Begin to play each task `samples` times, with a pause while `most_waiting` whole groups wait for `take`."""
        ray.get(self._manager.manager.play.remote(list(tasks), samples, most_waiting), timeout=ANSWER_TIMEOUT_S)

    def take(self, most: int, wait_s: float) -> Taken:
        """At most `most` finished groups of `play`, as soon as there is one; none after `wait_s` seconds.

        Raises:
            RolloutStopped: it cannot go on, and everything that was whole has been taken.
            TimeoutError: the manager does not answer.
        """
        try:
            taken: Taken = answer(self._manager.manager.take.remote(most, wait_s), wait_s + ANSWER_TIMEOUT_S)
            return taken
        except GetTimeoutError as error:
            raise TimeoutError(f"the RolloutManager did not answer within {wait_s + ANSWER_TIMEOUT_S} s") from error

    def snapshot(self) -> RolloutState:
        """Where the rollouts stand, after the step that was collected last. Raises RolloutStopped as `collect` does."""
        return self._manager.snapshot()

    def set_version(self, version: int) -> None:
        """Tell the manager which version the engines serve."""
        self._manager.set_version(version)

    def shutdown(self) -> None:
        """End the manager and all runners."""
        self._manager.close()
        if self._tracing is not None:
            flushed: list[Any] = [runner.flush_spans.remote() for runner in self._runners]
            ray.wait(flushed, num_returns=len(flushed), timeout=_FLUSH_TIMEOUT_S)  # one that is dead has none
        for runner in self._runners:
            try:
                ray.kill(runner)
            except RayActorError:
                continue  # it is already dead, which is what was wanted
