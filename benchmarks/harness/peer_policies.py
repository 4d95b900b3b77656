"""The ways in which other frameworks schedule multi-turn episodes, on raygym's own engine, turns and environments.

They are policies, not those packages: everything but the decision what runs when is ours, and the same for all
(`EnvRunner.run_episode`, the stream of turns to the PolicyServer), so a ratio says what the decision is worth and
nothing about anybody's code. Several of them have other modes as well. Read in their public repositories:

- `lock_step`: NeMo RL's `run_multi_turn_rollout`. All episodes of a batch do a turn together: the whole batch is
  generated, then all environments step, then comes the next turn of those that have not ended.
- `whole_batch`: verl's `AgentLoopWorker.generate_sequences`, SkyRL's `SkyRLGymGenerator.generate`, NeMo RL's
  `run_async_multi_turn_rollout`. Episodes of a batch go on by themselves; all are waited for.
- `top_up`: slime's `fully_async_rollout.py` example. A loop wakes up each second and starts as many as have ended
  meanwhile. slime counts a place for each group and knows no bound of staleness; here each episode has its place, which
  is the better of the two, and the bound is that of ours.
- `threads`: nobody's in particular. One process, one thread for each place, where everything blocks; a thread takes
  the next episode as soon as it has none. (SkyRL has threads for environments only.) The turn itself is not a blocking
  HTTP call, as it would be in such a program, but ours: that is in its favour.

The first two are synchronous by nature: a step's episodes are all of its own version. The other two overlap steps under
the same `max_staleness` as ours, by our own `Scheduler`: `top_up` asks it once a second where ours asks at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray

from harness.episodes import Episodes, Step
from harness.lock_step import LockStep
from harness.rollout_stack import IMPORTS, MAX_TOKENS, environment, limits, policy_server, rollout_config
from raygym.actors.env_runner import EnvRunner
from raygym.actors.policy_server import DEPLOYMENT
from raygym.actors.turn_exchange import TurnExchange
from raygym.config import EnvConfig
from raygym.episode import EpisodeLimits
from raygym.schedule import Assignment, Scheduler, SchedulerOptions
from raygym.tasks import TaskCursor
from raygym.types import Generation, Int32Array, Sampling, Trajectory

OVERLAPPING = ("top_up", "threads")
POLICIES = ("lock_step", "whole_batch", *OVERLAPPING)
_PLAY_TIMEOUT_S = 1800
Play = Callable[..., Sequence[Step]]
"""Plays so many steps by a policy: `play(policy, steps, wake_s)`."""


class PeerScheduler:
    """One process that plays tasks by one of `POLICIES`. Wrapped as a Ray actor by `peer_scheduler`."""

    def __init__(self, env: EnvConfig, model_dir: str, episode_limits: EpisodeLimits, app: str) -> None:
        self._label = env.label
        turns = TurnExchange(DEPLOYMENT, app)
        self._lock_step = LockStep(turns)
        self._blocking = _BlockingTurns(turns)

        def runner(generate: Any) -> EnvRunner:
            return EnvRunner([env], model_dir, episode_limits, 0, DEPLOYMENT, app, generate)

        self._runner, self._lock_step_runner, self._thread_runner = map(
            runner, (turns, self._lock_step, self._blocking)
        )
        self._threads: ThreadPoolExecutor | None = None

    async def play(self, policy: str, options: SchedulerOptions, collected: int, wake_s: float) -> list[Step]:
        """The first `collected` steps.

        Args:
            policy: one of `POLICIES`.
            options: more steps than are collected, so that the last one has no end of the stream to wait for.
            collected: how many.
            wake_s: how often `top_up` wakes up, in seconds.
        """
        if policy not in OVERLAPPING:
            options = replace(options, max_staleness=0)
        scheduler = Scheduler(TaskCursor([(self._label, 1.0)], 0), options)
        self._blocking.loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(options.max_concurrent)
        episode = {"lock_step": self._in_lock_step, "threads": self._in_thread}.get(policy, self._alone)
        episodes = Episodes(scheduler, episode, wake_s if policy == "top_up" else 0.0)
        try:
            return [await episodes.step(number) for number in range(collected)]
        finally:
            # A thread that blocks cannot be cancelled: its episode is played to its end.
            await episodes.end(cancel=policy != "threads")
            self._threads.shutdown()

    def _alone(self, assignment: Assignment) -> Awaitable[Trajectory]:
        return _run(self._runner, assignment)

    def _in_lock_step(self, assignment: Assignment) -> Awaitable[Trajectory]:
        # Now, not at the episode's first step: those that are started together are one batch.
        self._lock_step.join()
        return self._until_left(assignment)

    async def _until_left(self, assignment: Assignment) -> Trajectory:
        try:
            return await _run(self._lock_step_runner, assignment)
        finally:
            self._lock_step.leave()

    def _in_thread(self, assignment: Assignment) -> Awaitable[Trajectory]:
        def blocking() -> Trajectory:
            return asyncio.run(_run(self._thread_runner, assignment))

        return asyncio.get_running_loop().run_in_executor(self._threads, blocking)


class _BlockingTurns:
    """A `Generate` that blocks the thread which calls it. The turn itself goes the way of all others, on `loop`."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, turns: TurnExchange) -> None:
        self._turns = turns

    async def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        turn = self._turns(prompt_token_ids, sampling, session_id)
        return asyncio.run_coroutine_threadsafe(turn, self.loop).result(_PLAY_TIMEOUT_S)


async def _run(runner: EnvRunner, assignment: Assignment) -> Trajectory:
    a = assignment
    return await runner.run_episode(a.task, a.group_id, a.episode, a.attempt, Sampling(1.0, MAX_TOKENS))


@contextmanager
def peer_scheduler(simulated: dict[str, Any], rollout: dict[str, Any], *, turns: int, spread: int) -> Iterator[Play]:
    """A PolicyServer and, in a process of its own, the policies; see `rollout_stack` for the arguments."""
    config = rollout_config(rollout)
    given = {name: getattr(config, name) for name in SchedulerOptions.__slots__ if name != "steps"}
    with policy_server(simulated) as (model_dir, app):
        actor: Any = ray.remote(PeerScheduler)
        scheduler = actor.options(num_cpus=0, runtime_env=IMPORTS).remote(
            environment(turns, spread), model_dir, limits(config, turns + spread), app
        )

        def play(policy: str, steps: int, wake_s: float = 1.0) -> Sequence[Step]:
            options = SchedulerOptions(**given, steps=steps + 3)
            return ray.get(scheduler.play.remote(policy, options, steps, wake_s), timeout=_PLAY_TIMEOUT_S)

        yield play
