"""PolicyServer, EnvRunners and RolloutManager as a run has them, on the simulated engine, for benchmarks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from harness.watched import processes
from raygym.actors import cluster, serving
from raygym.actors.env_runner import start_env_runner
from raygym.actors.policy_server import DEPLOYMENT
from raygym.actors.rollout_manager import start_manager
from raygym.config import EnvConfig, PolicyConfig, RolloutConfig
from raygym.episode import EpisodeLimits
from raygym.models import resolve_policy
from raygym.schedule import Collected
from raygym.tasks import validation_tasks
from raygym.types import Sampling

APP = "rollout-benchmark"
# Where this package is, for the runners to import the environment from, and the raygym beside it.
_FOLDER = Path(__file__).resolve().parent.parent
_IMPORTS = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(_FOLDER), str(_FOLDER.parent)])}}
MAX_TOKENS = 16
ENV = "fixed"


@dataclass(frozen=True, slots=True)
class Measured:
    """One collection."""

    collected: Collected
    seconds: float
    cpu_s: dict[str, float]
    """Processor time by what a process is: manager, runner, replica, driver, other (Ray's own)."""


@contextmanager
def rollout_stack(
    simulated: dict[str, Any], rollout: dict[str, Any], *, turns: int = 5, steps: int = 2
) -> Iterator[Stack]:
    """Everything started and warm; ended afterwards."""
    config = RolloutConfig(max_tokens_per_turn=MAX_TOKENS, turn_timeout_s=600, episode_timeout_s=3600, **rollout)
    policy = PolicyConfig(model="tiny", engine="simulated", simulated={"max_model_len": 8192, **simulated})
    model_dir = str(resolve_policy("tiny"))
    env = EnvConfig(id="harness.fixed_turns:FixedTurns", name=ENV, kwargs={"turns": turns}, max_turns=turns)
    limits = EpisodeLimits(
        max_turns=turns,
        max_tokens_per_turn=MAX_TOKENS,
        max_model_len=8192,
        turn_timeout_s=config.turn_timeout_s,
        step_timeout_s=config.step_timeout_s,
        episode_timeout_s=config.episode_timeout_s,
    )
    cluster.connect()
    try:
        serving.deploy(APP, policy, model_dir, cluster.http_port(policy.http))
        runners = [
            start_env_runner(
                [env],
                model_dir,
                limits,
                0,
                deployment=DEPLOYMENT,
                app=serving.app_name(APP),
                max_concurrent=config.max_concurrent,
                runtime_env=_IMPORTS,
            )
            for _ in range(config.env_runners)
        ]
        policy_at = (DEPLOYMENT, serving.app_name(APP))
        manager = start_manager(config, [env], 0, steps, 0.0, runners, policy=policy_at)
        ray.get([runner.ping.remote() for runner in runners], timeout=120)
        yield Stack(manager, runners)
    finally:
        serving.undeploy(APP)
        cluster.disconnect()


class Stack:
    """A started stack; each collection is the next step."""

    def __init__(self, manager: Any, runners: Sequence[Any]) -> None:
        self._manager = manager
        self._runners = runners
        self._step = 0

    def warm_up(self) -> None:
        """A few episodes past the manager, so that what EnvRunners and engines load late is there."""
        tasks = validation_tasks([(ENV, 1.0)], 64)
        calls = [
            runner.run_episode.remote(task, f"warm-up-{task.index}", 0, 0, Sampling(1.0, MAX_TOKENS))
            for runner in self._runners
            for task in tasks
        ]
        ray.get(calls, timeout=600)

    def collect(self, timeout_s: float = 1200) -> Measured:
        """The next step's groups."""
        ray.get(self._manager.set_version.remote(self._step), timeout=60)
        before, started = _cpu_s(), time.perf_counter()
        collected: Collected = ray.get(self._manager.collect.remote(self._step), timeout=timeout_s)
        seconds = time.perf_counter() - started
        after = _cpu_s()
        self._step += 1
        return Measured(collected, seconds, {name: after[name] - before.get(name, 0.0) for name in after})


def _cpu_s() -> dict[str, float]:
    totals: dict[str, float] = {}
    for kind, process in processes():
        with suppress(psutil.Error):  # it has just ended
            times = process.cpu_times()
            totals[kind] = totals.get(kind, 0.0) + times.user + times.system
    return totals
