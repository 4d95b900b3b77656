"""What the real RolloutManager costs in processor time: in this process, with EnvRunners that answer at once.

It is the class that a run has as an actor, with its scheduler, its event loop and trajectories of a real size. Ray's
own part of a call is not in it; `measure_ray_call` measures that with a real actor.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import ray

from harness.virtual_manager import ManagerCost
from raygym.actors.rollout_manager import RolloutManager
from raygym.config import EnvConfig, RolloutConfig
from raygym.episode_exchange import Client, EpisodeRequest, Finished
from raygym.types import EpisodeStatus, Sampling, Task, Trajectory, Turn

_GROUP_SIZE = 8
_TURNS = 3
_FEW, _MANY = 1, 64
_PLACES = 256


def measure_manager(ray_call_s: float, tokens: int, episodes: int = 4096) -> ManagerCost:
    """Play `episodes`, with one and with many in an answer, and tell the parts apart.

    Args:
        ray_call_s: Ray's part of a call.
        tokens: of an episode.
        episodes: in all.
    """
    begin_few_s, few_s = asyncio.run(_play(episodes, tokens, _FEW))
    begin_many_s, many_s = asyncio.run(_play(episodes, tokens, _MANY))
    # Of a call and one episode, less that of its share of a call and one episode.
    call_s = max(0.0, (few_s - many_s) / (1 - _FEW / _MANY))
    begin_s = (begin_few_s + begin_many_s) / 2
    return ManagerCost(ray_call_s + call_s, begin_s, max(0.0, few_s - call_s - begin_s))


def measure_ray_call(tokens: int, calls: int = 1500) -> tuple[float, float]:
    """Seconds of processor time of a process that calls an actor: of a call, and of each trajectory in its answer.

    Ray must be running. As a manager does, it has several calls open; here to four actors.
    """
    payload = _outcome(EpisodeRequest(0, Task(0, "fixed", 0), "train-0", 0, 0, Sampling(), None), tokens)
    answering: Any = ray.remote(_Answering)
    actors = [answering.options(num_cpus=0).remote(payload) for _ in range(4)]
    ray.get([actor.exchange.remote(1) for actor in actors], timeout=120)
    one_s, eight_s = (asyncio.run(_call(actors, calls, outcomes)) for outcomes in (1, 8))
    for actor in actors:
        ray.kill(actor)
    trajectory_s = max(0.0, (eight_s - one_s) / 7)
    return max(0.0, one_s - trajectory_s), trajectory_s


class _Answering:
    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    async def exchange(self, outcomes: int, begin: Sequence[EpisodeRequest] = ()) -> Finished:
        return [(number, self._payload) for number in range(outcomes)]


async def _call(actors: list[Any], calls: int, outcomes: int) -> float:
    begin = [
        EpisodeRequest(number, Task(number, "fixed", number), "train-0", 0, 0, Sampling(), 64)
        for number in range(outcomes)
    ]

    async def some(actor: Any) -> None:
        for _ in range(calls // len(actors)):
            await asyncio.wrap_future(actor.exchange.remote(outcomes, begin).future())

    process = psutil.Process(os.getpid())
    before = process.cpu_times()
    await asyncio.gather(*map(some, actors))
    after = process.cpu_times()
    seconds: float = after.user + after.system - before.user - before.system
    return seconds / (calls // len(actors) * len(actors))


@dataclass(slots=True)
class _Reference:
    """What a remote call gives, and is done already."""

    done: Future[Any] = field(default_factory=Future)

    def future(self) -> Future[Any]:
        return self.done


class _Method:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self, *args: Any) -> _Reference:
        reference = _Reference()
        reference.done.set_result(self._answer(*args))
        return reference


class _AnswersAtOnce:
    """An EnvRunner whose episodes have ended when they begin; what it does itself is counted in `own_s`."""

    def __init__(self, tokens: int, in_one: int) -> None:
        self._tokens, self._in_one = tokens, in_one
        self._begun: list[EpisodeRequest] = []
        self.own_s = 0.0
        self.first_call_s: float | None = None
        self.first_wave = 0
        self.calls = 0
        self.exchange = _Method(self._exchange)
        self.ping = _Method(lambda: "this process")

    def _exchange(
        self, client: Client, begin: Sequence[EpisodeRequest], cancelled: Sequence[int], wait_s: float
    ) -> Finished:
        started_s = time.thread_time()
        self.calls += 1
        if self.first_call_s is None:
            self.first_call_s, self.first_wave = started_s, len(begin)
        self._begun += begin
        answer = self._begun[: self._in_one] if wait_s else []
        del self._begun[: len(answer)]
        finished = [(request.number, _outcome(request, self._tokens)) for request in answer]
        self.own_s += time.thread_time() - started_s
        return finished


async def _play(episodes: int, tokens: int, in_one: int) -> tuple[float, float]:
    """Seconds of processor time of an episode's beginning, in the first wave, and of a whole one after that."""
    config = RolloutConfig(
        groups_per_step=episodes // _GROUP_SIZE,
        group_size=_GROUP_SIZE,
        max_concurrent=_PLACES,
        max_tokens_per_turn=16,
    )
    env = EnvConfig(id="harness.fixed_turns:FixedTurns", name="fixed")
    runner: Any = _AnswersAtOnce(tokens, in_one)
    manager = RolloutManager(config, [env], 0, 1, 0.0, [runner])
    started_s = time.thread_time()
    collected = await manager.collect(0)
    ended_s = time.thread_time()
    assert len(collected.groups) * _GROUP_SIZE == episodes and not collected.failures, collected.failures
    assert runner.first_call_s is not None
    begun_s = runner.first_call_s - started_s
    # Of the two times that a call takes the time, one lies outside of what it notes.
    whole_s = ended_s - started_s - begun_s - runner.own_s - runner.calls * _clock_s()
    # The first wave ended without beginning here, and the others did both.
    begin_s = begun_s / runner.first_wave
    return begin_s, (whole_s + begin_s * runner.first_wave) / episodes


def _clock_s(times: int = 1000) -> float:
    """What it costs to ask for the processor time: in a sandbox, tens of microseconds."""
    started_s = time.thread_time()
    for _ in range(times):
        time.thread_time()
    return (time.thread_time() - started_s) / (times + 1)


def _outcome(request: EpisodeRequest, tokens: int) -> bytes:
    """An episode of so many tokens, a third of them its prompt, as its runner sends it."""
    prompt = tokens // 3
    ends = np.linspace(prompt, tokens, _TURNS + 1).astype(int)
    mask = np.arange(tokens) >= prompt
    trajectory = Trajectory(
        task=request.task,
        group_id=request.group_id,
        episode=request.episode,
        attempt=request.attempt,
        status=EpisodeStatus.TERMINATED,
        token_ids=np.arange(tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, np.float32(-1), np.float32(0)),
        weight_versions=np.where(mask, np.int32(0), np.int32(-1)),
        turns=tuple(Turn(int(start), int(end), 0.0, "stop", 1.0, 0.1) for start, end in pairwise(ends)),
        reward=float(request.episode % 2),
        messages=tuple({"role": role, "content": "x" * tokens} for role in ("user", *["assistant", "user"] * _TURNS)),
        sampling=request.sampling,
    )
    return pickle.dumps(trajectory)
