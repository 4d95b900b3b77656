"""PolicyServer, EnvRunners and RolloutManager as a run has them, on the simulated engine, for benchmarks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray

from harness.watched import processes
from raygym.actors import cluster, serving
from raygym.actors.env_runner import start_env_runner
from raygym.actors.policy_server import DEPLOYMENT
from raygym.actors.process import freeze_past
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
IMPORTS = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(_FOLDER), str(_FOLDER.parent)])}}
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
    simulated: dict[str, Any], rollout: dict[str, Any], *, turns: int = 5, spread: int = 0, steps: int = 2
) -> Iterator[Stack]:
    """Everything started and warm; ended afterwards.

    Args:
        simulated: `policy.simulated` of a run config.
        rollout: its `rollout`.
        turns: of an episode; with `spread`, of the mean one.
        spread: see `FixedTurns`.
        steps: of the run.
    """
    config = rollout_config(rollout)
    env = environment(turns, spread)
    with policy_server(simulated) as (model_dir, app):
        runners = [
            start_env_runner(
                [env],
                model_dir,
                limits(config, turns + spread),
                0,
                deployment=DEPLOYMENT,
                app=app,
                max_concurrent=config.max_concurrent,
                runtime_env=IMPORTS,
            )
            for _ in range(config.env_runners)
        ]
        manager = start_manager(config, [env], 0, steps, 0.0, runners, policy=(DEPLOYMENT, app))
        ray.get([runner.ping.remote() for runner in runners], timeout=120)
        freeze_past()  # as a run's driver does
        yield Stack(manager, runners)


@contextmanager
def policy_server(simulated: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A Ray cluster with one replica of the simulated engine: the policy's files and the Serve application."""
    policy = PolicyConfig(model="tiny", engine="simulated", simulated={"max_model_len": 8192, **simulated})
    model_dir = str(resolve_policy("tiny"))
    cluster.connect()
    try:
        serving.deploy(APP, policy, model_dir, cluster.http_port(policy.http))
        yield model_dir, serving.app_name(APP)
    finally:
        serving.undeploy(APP)
        cluster.disconnect()


def rollout_config(rollout: dict[str, Any]) -> RolloutConfig:
    """`rollout` of a run config, with deadlines that no benchmark reaches."""
    return RolloutConfig(max_tokens_per_turn=MAX_TOKENS, turn_timeout_s=600, episode_timeout_s=3600, **rollout)


def environment(turns: int, spread: int = 0) -> EnvConfig:
    """`FixedTurns` as an environment of a run."""
    kwargs = {"turns": turns, "spread": spread}
    return EnvConfig(id="harness.fixed_turns:FixedTurns", name=ENV, kwargs=kwargs, max_turns=turns + spread)


def limits(config: RolloutConfig, turns: int) -> EpisodeLimits:
    """What an episode of at most `turns` turns may use."""
    return replace(EpisodeLimits.of(config, 8192), max_turns=turns)


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
        before, started = _cpu_s(), time.perf_counter()
        ray.get(self._manager.set_version.remote(self._step), timeout=60)  # episodes of the step begin now
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
