"""The Ray actor that runs the Scheduler's assignments on the EnvRunners. One remote call per episode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, TaskCancelledError

from raygym.config import RolloutConfig
from raygym.schedule import Assignment, Collected, RolloutStopped, Scheduler
from raygym.tasks import TaskCursor
from raygym.types import EpisodeFailure, FailureKind, Sampling, Task, Trajectory

# An EnvRunner keeps the episode's own deadlines; only one that is stuck itself is noticed by this margin.
_RUNNER_MARGIN_S = 30.0


class RolloutManager:
    """Keeps the runners busy with the assignments that the scheduler gives out."""

    def __init__(
        self,
        config: RolloutConfig,
        envs: Sequence[tuple[str, float]],
        seed: int,
        steps: int,
        validation_temperature: float,
        runners: Sequence[ActorHandle[Any]],
    ) -> None:
        self._scheduler = Scheduler(
            TaskCursor(envs, seed),
            groups_per_step=config.groups_per_step,
            group_size=config.group_size,
            steps=steps,
            max_concurrent=config.max_concurrent,
            max_staleness=config.max_staleness,
            max_retries=config.max_retries,
            max_replaced_groups=config.max_replaced_groups,
        )
        self._deadline_s = config.episode_timeout_s + _RUNNER_MARGIN_S
        self._sampling = {
            "train": Sampling(config.temperature, config.max_tokens_per_turn),
            "validation": Sampling(validation_temperature, config.max_tokens_per_turn),
        }
        self._runners = list(runners)
        self._load = [0] * len(self._runners)
        self._calls: dict[Assignment, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._stopped: RolloutStopped | None = None

    async def collect(self, step: int) -> Collected:
        """The whole groups of one step; returns when the last of them is finished.

        Raises:
            RolloutStopped: an environment or the engine fails always.
        """
        return await self._wait(lambda: self._scheduler.collect_step(step))

    async def validate(self, tasks: Sequence[Task]) -> Collected:
        """One episode of each task, with validation's sampling."""
        self._scheduler.add_validation(tasks)
        return await self._wait(self._scheduler.collect_validation)

    async def set_version(self, version: int) -> None:
        """The engines serve a new version: more groups may start."""
        self._scheduler.set_version(version)
        self._fill()

    async def progress(self) -> str:
        """One line on what is going on; an answer means that the event loop is alive."""
        return self._scheduler.describe()

    async def _wait(self, collected: Callable[[], Collected | None]) -> Collected:
        self._fill()
        while True:
            if self._stopped is not None:
                raise self._stopped
            if (result := collected()) is not None:
                return result
            self._changed.clear()
            await self._changed.wait()

    def _fill(self) -> None:
        if self._stopped is None:
            for assignment in self._scheduler.start():
                self._calls[assignment] = asyncio.create_task(self._run(assignment))

    async def _run(self, assignment: Assignment) -> None:
        runner = min(range(len(self._runners)), key=self._load.__getitem__)
        self._load[runner] += 1
        try:
            outcome = await self._call(self._runners[runner], assignment)
        except asyncio.CancelledError:
            outcome = EpisodeFailure(FailureKind.CANCELLED, "its group was given up")
        finally:
            self._load[runner] -= 1
            del self._calls[assignment]
        try:
            for obsolete in self._scheduler.finish(assignment, outcome):
                if obsolete in self._calls:
                    self._calls[obsolete].cancel()
        except RolloutStopped as stop:
            self._stopped = stop
        self._fill()
        self._changed.set()

    async def _call(self, runner: Any, assignment: Assignment) -> Trajectory | EpisodeFailure:
        reference = runner.run_episode.remote(
            assignment.task,
            assignment.group_id,
            assignment.episode,
            assignment.attempt,
            self._sampling[assignment.task.split],
        )
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), self._deadline_s)
        except asyncio.CancelledError:
            _cancel(reference)
            raise
        except TimeoutError:
            _cancel(reference)
            return EpisodeFailure(FailureKind.ENV_LOST, f"its EnvRunner did not answer within {self._deadline_s} s")
        except TaskCancelledError:
            return EpisodeFailure(FailureKind.CANCELLED, "its group was given up")
        except RayActorError as error:
            return EpisodeFailure(FailureKind.ENV_LOST, f"its EnvRunner died: {str(error).splitlines()[0]}")
        except RayError as error:
            return EpisodeFailure(FailureKind.ENV_ERROR, f"its EnvRunner raised: {error}")


def _cancel(reference: Any) -> None:
    # Its result no longer matters, whether or not the runner still gets the message.
    ray.cancel(reference)
