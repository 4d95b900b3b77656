"""The Ray actor that runs the Scheduler's assignments on the EnvRunners, over one `EpisodeClient` each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from raygym.actors.concurrency_loop import ConcurrencyLoop
from raygym.actors.process import settle_process
from raygym.actors.runner_supervisor import RunnersLost, RunnerSupervisor, Supervision
from raygym.concurrency import AdaptiveConcurrency
from raygym.config import EnvConfig, RolloutConfig
from raygym.episode_exchange import EpisodeClient, EpisodesLost, Finished
from raygym.loop_lag import LoopLag
from raygym.rollout_state import RolloutState
from raygym.schedule import Assignment, Collected, RolloutStopped, Scheduler, SchedulerOptions, SchedulerState
from raygym.supervision import PartEvent
from raygym.task_stream import Taken, TaskStream
from raygym.tasks import TaskCursor
from raygym.testing import chaos
from raygym.types import EpisodeFailure, FailureKind, Group, Sampling, Task, Trajectory

# An EnvRunner keeps the episode's own deadlines, and one that is stuck itself is noticed by its supervisor.
_RUNNER_MARGIN_S = 30.0
# Episodes handed to the runners beyond those that may run, as a share: one that ends makes room for one that is there
# already, instead of leaving its place empty for the way to the manager and back.
_AHEAD = 0.25
_ON_THEIR_WAY_S = 0.05


class RolloutManager:
    """Keeps the runners busy with the assignments that the scheduler gives out."""

    def __init__(
        self,
        config: RolloutConfig,
        envs: Sequence[EnvConfig],
        seed: int,
        steps: int,
        validation_temperature: float,
        runners: Sequence[ActorHandle[Any]],
        supervision: Supervision | None = None,
        state: SchedulerState | None = None,
        policy: tuple[str, str] | None = None,
        whole: Sequence[Group] = (),
    ) -> None:
        """Nothing is played yet.

        Args:
            config: `rollout` of the run.
            envs: the run's environments.
            seed: of the order of tasks.
            steps: how many there are to train.
            validation_temperature: of validation episodes.
            runners: the EnvRunners that host `envs`.
            supervision: how closely they are watched.
            state: what a manager before this one left to do.
            policy: deployment and Serve application of the engines, whose load is asked for where
                `rollout.concurrency` is adaptive.
            whole: groups that `state` owes and that need not be played again.
        """
        state = state or SchedulerState()
        given = {name: getattr(config, name) for name in SchedulerOptions.__slots__ if name != "steps"}
        cursor = TaskCursor([(env.label, env.weight) for env in envs], seed, state.cursor)
        self._options = SchedulerOptions(**given, steps=steps)
        self._scheduler = Scheduler(cursor, self._options, time.monotonic, state, whole)
        self._control: AdaptiveConcurrency | None = None
        self._control_loop: ConcurrencyLoop | None = None
        if config.concurrency == "adaptive":
            assert policy is not None, "adaptive concurrency needs to know the engines' deployment"
            self._control = AdaptiveConcurrency(config.min_concurrent, config.max_concurrent, time.monotonic)
            self._control_loop = ConcurrencyLoop(self._control, *policy, self._episodes, self._limited)
        self._set_limit(self._control.limit if self._control else config.max_concurrent)
        self._stream: TaskStream | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._deadline_s = {env.label: _deadline_s(config, env) for env in envs}
        # The runner cuts it down to what the episode's environment may use.
        most_tokens = max(env.max_tokens_per_turn or config.max_tokens_per_turn for env in envs)
        self._sampling = {
            "train": Sampling(config.temperature, most_tokens),
            "validation": Sampling(validation_temperature, most_tokens),
        }
        self._runners = list(runners)
        if state.restarts:
            for runner in self._runners:
                # It comes before every episode of this manager. A runner that is dead has none, and one that hangs is
                # noticed by its supervisor, so nobody waits for the answers.
                runner.abandon_before.remote(self._scheduler.first_attempt)
        self._supervision = supervision or Supervision()
        self._supervisor: RunnerSupervisor | None = None
        self._generation = state.restarts
        self._clients: list[EpisodeClient] = []
        self._calls: dict[Assignment, asyncio.Task[Trajectory | EpisodeFailure]] = {}
        self._changed = asyncio.Event()
        self._stopped: RolloutStopped | None = None
        self._lag = LoopLag()
        settle_process()

    async def collect(self, step: int) -> Collected:
        """The whole groups of one step; returns when the last of them is finished.

        Raises:
            RolloutStopped: an environment or the engine fails always.
        """
        chaos.at("manager.collect")
        collected = await self._wait(lambda: self._scheduler.collect_step(step))
        concurrency = self._control.take_mean() if self._control else self._scheduler.max_concurrent
        events = await self.take_part_events()
        return replace(collected, loop_lag_ms=self._lag.take(), concurrency=concurrency, part_events=events)

    async def validate(self, tasks: Sequence[Task], deadline_s: float = math.inf) -> Collected:
        """One episode of each task, with validation's sampling, beside the training.

        Tasks that are not done after `deadline_s` are dropped. Raises RolloutStopped as `collect` does.
        """
        self._fill()  # training goes first, or it would find all places taken
        self._scheduler.add_validation(tasks, deadline_s)
        return await self._wait(self._scheduler.collect_validation)

    async def play(self, tasks: Sequence[Task], samples: int, most_waiting: int) -> None:
        """Begin to play each task `samples` times; `take` has what is finished.

        No new task begins while `most_waiting` whole groups or more wait to be taken.
        """
        assert self._stream is None, "the tasks given before are still being played"
        self._stream = TaskStream(tasks, samples, self._options, most_waiting)
        self._fill()

    async def take(self, most: int, wait_s: float) -> Taken:
        """At most `most` groups of `play`, as soon as one is whole; none after `wait_s` seconds.

        Raises:
            RolloutStopped: an environment or the engine fails always, and all that was whole is taken.
        """
        stream = self._stream
        assert stream is not None, "nothing is being played"
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self._stopped is None and not stream.has_news():
                    self._changed.clear()
                    await self._changed.wait()
        if self._stopped is not None and not stream.has_news():
            raise self._stopped
        taken = stream.take(most)
        # What waits in the runners for its place does not run yet.
        taken = replace(taken, running=min(taken.running, self._scheduler.max_concurrent))
        if taken.done:
            self._stream = None
        self._fill()
        return taken

    async def snapshot(self) -> RolloutState:
        """Where the training's rollouts stand at this moment, with what is whole; nothing that is played is stopped."""
        return RolloutState(self._scheduler.state(), self._scheduler.whole_groups())

    async def set_version(self, version: int) -> None:
        """The engines serve a new version: more groups may start."""
        self._scheduler.set_version(version)
        self._fill()

    async def progress(self) -> str:
        """One line on what is going on; an answer means that the event loop is alive."""
        limit = f", at most {self._control.limit} at once" if self._control else ""
        return self._scheduler.describe() + limit

    async def take_part_events(self) -> tuple[PartEvent, ...]:
        """What became of EnvRunners since it was asked last."""
        return self._supervisor.take_events() if self._supervisor else ()

    async def runners_up(self) -> list[bool]:
        """Which of the EnvRunners answer."""
        return self._supervisor.states() if self._supervisor else [True] * len(self._runners)

    async def _wait(self, collected: Callable[[], Collected | None]) -> Collected:
        self._lag.start()
        self._fill()
        while True:
            if self._stopped is not None:
                raise self._stopped
            if (result := collected()) is not None:
                self._fill()
                return result
            self._changed.clear()
            await self._changed.wait()

    def _fill(self) -> None:
        """Start what may start, cancel what is not wanted any more, and come back when the next group expires."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._stopped is not None:
            return
        if self._control_loop is not None:
            self._control_loop.start()
        try:
            self._scheduler.expire()
        except RolloutStopped as stop:
            self._stop(stop)
            return
        stream = self._stream
        for assignment in [*self._scheduler.obsolete(), *(stream.obsolete() if stream else ())]:
            if assignment in self._calls:
                self._calls[assignment].cancel()
        started = self._scheduler.start()
        if stream is not None:
            places = self._scheduler.max_concurrent + self._scheduler.ahead
            started += stream.start(places - self._scheduler.running - stream.running)
        for assignment in started:
            self._begin(assignment)
        if (expires_s := self._scheduler.next_expiry()) is not None:
            wait_s = max(0.0, expires_s - time.monotonic())
            self._alarm = asyncio.get_running_loop().call_later(wait_s, self._expired)

    def _expired(self) -> None:
        self._fill()
        self._changed.set()  # a validation may be over

    def _episodes(self) -> int:
        return self._scheduler.running + (self._stream.running if self._stream else 0)

    def _set_limit(self, limit: int) -> None:
        self._scheduler.max_concurrent = limit
        self._scheduler.ahead = math.ceil(_AHEAD * limit)

    def _limited(self, limit: int) -> None:
        """Another limit than before: for what is handed out, and for what the runners have waiting already."""
        self._set_limit(limit)
        if self._supervisor is not None:
            # After the episodes that are on their way with the number from before.
            asyncio.get_running_loop().call_later(_ON_THEIR_WAY_S, self._resize_runners)
        self._fill()

    def _resize_runners(self) -> None:
        for runner in self._runners:
            # Nobody waits for the answers: one that is down learns it with its next episode.
            runner.resize.remote(self._places())

    def _places(self) -> int:
        """Episodes that may run in each runner."""
        assert self._supervisor is not None
        return math.ceil(self._scheduler.max_concurrent / self._supervisor.up)

    def _stop(self, stop: RolloutStopped) -> None:
        self._stopped = stop
        self._changed.set()

    def _begin(self, assignment: Assignment) -> None:
        call = self._calls[assignment] = asyncio.create_task(self._call(assignment))
        # Not by the task itself: one that is cancelled before its first step never runs, and would keep its place.
        call.add_done_callback(partial(self._ended, assignment))

    def _ended(self, assignment: Assignment, call: asyncio.Task[Trajectory | EpisodeFailure]) -> None:
        del self._calls[assignment]
        outcome: Trajectory | EpisodeFailure
        if call.cancelled():
            outcome = EpisodeFailure(FailureKind.CANCELLED, "its group was given up")
        elif isinstance(error := call.exception(), RunnersLost):
            self._stop(RolloutStopped(str(error)))
            return
        elif error is not None:
            outcome = EpisodeFailure(FailureKind.ENV_LOST, f"its call failed: {type(error).__name__}: {error}")
        else:
            outcome = call.result()
        if self._control is not None:
            turns = outcome.turns if isinstance(outcome, Trajectory) else ()
            self._control.episode_ended(len(turns), sum(turn.generate_s + turn.env_s for turn in turns))
        try:
            stream = self._stream
            owner = stream if stream is not None and assignment in stream else self._scheduler
            owner.finish(assignment, outcome)
        except RolloutStopped as stop:
            self._stop(stop)
        self._fill()
        self._changed.set()

    async def _call(self, assignment: Assignment) -> Trajectory | EpisodeFailure:
        if self._supervisor is None:  # not by the constructor, which does not run in the actor's event loop
            self._supervisor = RunnerSupervisor(self._runners, self._supervision)
            numbers = self._generation, self._scheduler.first_attempt
            self._clients = [EpisodeClient(partial(_exchange, runner), *numbers) for runner in self._runners]
        supervisor = self._supervisor
        index = await supervisor.take()
        deadline_s = self._deadline_s[assignment.task.env]
        playing = self._clients[index].play(
            assignment.task,
            assignment.group_id,
            assignment.episode,
            assignment.attempt,
            self._sampling[assignment.task.split],
            self._places(),
        )
        try:
            async with asyncio.timeout(deadline_s):
                return await playing
        except TimeoutError:
            return EpisodeFailure(FailureKind.ENV_LOST, f"its EnvRunner did not answer within {deadline_s:.0f} s")
        except EpisodesLost as lost:
            if isinstance(lost.error, RayActorError):
                supervisor.lost(index, lost.error)
            return EpisodeFailure(FailureKind.ENV_LOST, f"its EnvRunner is lost: {lost}")
        finally:
            supervisor.release(index)


def start_manager(*args: Any, actor_options: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """Start a RolloutManager actor; returns before it is up.

    Args:
        args: RolloutManager's, as are all others but actor_options.
        actor_options: Ray's options for the actor, over the defaults (no CPU reserved).
    """
    actor: Any = ray.remote(RolloutManager)
    # collect, validate, set_version and progress may all be waiting at the same moment.
    return actor.options(**{"num_cpus": 0, "max_concurrency": 16, **(actor_options or {})}).remote(*args, **kwargs)


def _deadline_s(config: RolloutConfig, env: EnvConfig) -> float:
    """Of the call to a runner: the last resort, for an episode that its runner has forgotten."""
    longest_s = config.episode_timeout_s
    reset_s = min(env.step_timeout_s or config.step_timeout_s, longest_s)
    if env.isolation == "shared":
        # It waits for a place, as what is handed out ahead does, and is then played.
        return reset_s + 2 * longest_s + _RUNNER_MARGIN_S
    # Each instance has a process: episodes wait in the runner for one that is free, and hold it while they wait.
    rounds = math.ceil(config.max_concurrent / (env.processes or 1)) + 1
    return rounds * (reset_s + 2 * longest_s) + _RUNNER_MARGIN_S


async def _exchange(runner: Any, *args: Any) -> Finished:
    finished: Finished = await asyncio.wrap_future(runner.exchange.remote(*args).future())
    return finished
