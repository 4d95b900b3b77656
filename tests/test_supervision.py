"""Environments in processes of their own, and EnvRunners that die: each trouble has its kind, and the rest goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from broken_envs import SaysTenWhileOpen, says_ten, says_ten_for_ever
from test_env_runner import IMPORTS_THIS_MODULE, LIMITS, SAMPLING
from tiers import only_long

from raygym.actors.env_runner import start_env_runner
from raygym.actors.kept_manager import KeptManager
from raygym.actors.rollout_manager import start_manager
from raygym.actors.runner_supervisor import Supervision
from raygym.config import EnvConfig, RolloutConfig
from raygym.episode import EpisodeLimits
from raygym.models import resolve_policy
from raygym.schedule import Collected, RolloutStopped, SchedulerState
from raygym.supervision import Kind, What
from raygym.task_stream import Taken
from raygym.types import EpisodeFailure, EpisodeStatus, FailureKind, Task, Trajectory

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
BROKEN = "broken_envs:Broken"
# No turn and no episode is to meet its deadline here, also where a test holds them for as long as a process starts.
PATIENT = {f: getattr(LIMITS, f) for f in LIMITS.__slots__} | {"turn_timeout_s": 300.0, "episode_timeout_s": 300.0}


def start(envs: list[EnvConfig], generate: Any = says_ten, **options: Any) -> Any:
    return start_env_runner(
        envs,
        str(resolve_policy("tiny")),
        EpisodeLimits(**PATIENT),
        run_seed=0,
        generate=generate,
        max_concurrent=32,
        runtime_env=IMPORTS_THIS_MODULE,
        **options,
    )


def broken(how: str, where: str = "step", **config: Any) -> EnvConfig:
    kwargs = {"how": how, "where": where, **config.pop("kwargs", {})}
    # Only what hangs is to meet its deadline: of what hangs in `step`, not the reset in a process that was just made.
    timeout_s = 5.0 if how == "hang" else 60.0
    return EnvConfig(id=BROKEN, name=f"{how}-{where}", kwargs=kwargs, step_timeout_s=timeout_s, **config)


TROUBLE = [
    ("raise", "reset", FailureKind.ENV_ERROR, "the dice are gone"),
    ("raise", "step", FailureKind.ENV_ERROR, "the dice are gone"),
    ("garbage", "reset", FailureKind.ENV_ERROR, "expected a tuple"),
    ("garbage", "step", FailureKind.ENV_ERROR, "expected a tuple"),
    ("hang", "reset", FailureKind.ENV_TIMEOUT, "env.reset took longer than 5 s"),
    ("hang", "step", FailureKind.ENV_TIMEOUT, "env.step took longer than 5 s"),
    ("memory", "step", FailureKind.ENV_ERROR, "Memory"),
]


@pytest.fixture(scope="module")
def isolated(ray_cluster: Any) -> Any:
    options = {"isolation": "actor", "processes": 2, "memory_mib": 256}
    envs = [broken(how, where, **options) for how, where, *_ in [*TROUBLE, ("fine", "step"), ("close", "step")]]
    envs.append(broken("exit", "step", **options))
    runner = start(envs)
    yield runner
    ray.kill(runner)


def play(runner: Any, env: str, episode: int = 0, timeout: float = 150) -> Trajectory:
    return ray.get(runner.run_episode.remote(Task(0, env, 3), "g", episode, 0, SAMPLING), timeout=timeout)


class TestIsolation:
    @pytest.mark.parametrize(("how", "where", "kind", "detail"), TROUBLE)
    def test_each_trouble_has_its_kind(self, isolated: Any, how: str, where: str, kind: str, detail: str) -> None:
        # Beside it, an episode that goes well.
        beside = isolated.run_episode.remote(Task(0, "fine-step", 3), "g", 0, 0, SAMPLING)
        trajectory = play(isolated, f"{how}-{where}")
        assert (trajectory.failure, trajectory.reward) == (kind, 0.0)
        assert detail in trajectory.failure_detail
        assert ray.get(beside, timeout=150).reward == 1.0

    def test_a_dead_process_is_env_lost_and_the_next_episode_gets_a_new_one(self, isolated: Any) -> None:
        for _ in range(2):
            trajectory = play(isolated, "exit-step")
            assert trajectory.failure is FailureKind.ENV_LOST
            assert "died in env.step" in trajectory.failure_detail

    def test_more_episodes_than_processes_wait_for_their_turn(self, isolated: Any) -> None:
        calls = [isolated.run_episode.remote(Task(0, "fine-step", 3), "g", i, 0, SAMPLING) for i in range(12)]
        assert {t.reward for t in ray.get(calls, timeout=150)} == {1.0}

    def test_trouble_in_close_takes_nothing_back(self, isolated: Any) -> None:
        assert play(isolated, "close-step").reward == 1.0


def test_memory_of_a_shared_runner_is_bounded(ray_cluster: Any) -> None:
    runner = start([broken("memory"), broken("fine")], memory_mib=512)
    beside = [runner.run_episode.remote(Task(0, "fine-step", 3), "g", i, 0, SAMPLING) for i in range(4)]
    trajectory = play(runner, "memory-step")
    assert trajectory.failure is FailureKind.ENV_ERROR and "MemoryError" in trajectory.failure_detail
    assert {t.reward for t in ray.get(beside, timeout=150)} == {1.0}
    assert play(runner, "fine-step").reward == 1.0
    ray.kill(runner)


def manager(
    runners: list[Any], envs: list[EnvConfig], supervision: Supervision, state: Any = None, **options: Any
) -> Any:
    config = RolloutConfig(groups_per_step=4, group_size=4, max_concurrent=16, **options)
    imports = {"runtime_env": IMPORTS_THIS_MODULE}
    return start_manager(config, envs, 0, 100, 0.0, runners, supervision, state, actor_options=imports)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=only_long)])
def test_a_runner_that_dies_or_hangs_loses_only_its_episodes(ray_cluster: Any, tmp_path: Path, how: int) -> None:
    mark, gate = tmp_path / "pids", tmp_path / "gate"
    envs = [broken("fine", kwargs={"mark": str(mark)})]
    runners = [start(envs, SaysTenWhileOpen(str(gate))) for _ in range(2)]
    # A manager that watches them while they start could take a slow start for a hang.
    ray.get([runner.ping.remote() for runner in runners], timeout=150)
    # The time that a ping has is also what the runner has to be up again; only one that hangs is noticed by it.
    ping_timeout_s = 60.0 if how == signal.SIGSTOP else 120.0
    rollouts = manager(runners, envs, Supervision(ping_every_s=0.5, ping_timeout_s=ping_timeout_s))
    collecting = rollouts.collect.remote(0)
    wait_until(lambda: mark.is_file() and len(set(mark.read_text().split())) == 2, seconds=150)
    victim = int(mark.read_text().split()[0])
    os.kill(victim, how)
    gate.touch()  # only now: none of its episodes is over
    collected: Collected = ray.get(collecting, timeout=250)
    assert [len(group.trajectories) for group in collected.groups] == [4] * 4
    assert {t.status for g in collected.groups for t in g.trajectories} == {EpisodeStatus.TERMINATED}
    assert set(collected.failures) == {FailureKind.ENV_LOST} and not collected.dropped
    assert collected.concurrency == 16
    # It comes back, and both work.
    wait_until(lambda: ray.get(rollouts.runners_up.remote(), timeout=60) == [True, True], seconds=150)
    ray.get(rollouts.set_version.remote(1), timeout=60)
    after: Collected = ray.get(rollouts.collect.remote(1), timeout=150)
    assert not after.failures
    # All have answered once. What is told of one that was not lost has no consequence.
    name = next(event.name for event in collected.part_events if event.what is What.LOST)
    events = [event for event in (*collected.part_events, *after.part_events) if event.name == name]
    lost, back = events[-2:]
    assert (lost.kind, lost.what, back.what) == (Kind.ENV_RUNNER, What.LOST, What.RECOVERED)
    assert lost.name == back.name and lost.cause and lost.time_s < back.time_s
    for actor in (rollouts, *runners):
        ray.kill(actor)


def test_runners_that_are_gone_for_good_stop_the_run(ray_cluster: Any) -> None:
    envs = [broken("fine")]
    runner = start(envs, max_restarts=0)
    rollouts = manager([runner], envs, Supervision(first_wait_s=0.01), max_retries=100)
    ray.get(runner.ping.remote(), timeout=150)
    ray.kill(runner)
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(rollouts.collect.remote(0), timeout=150)
    assert isinstance(raised.value.cause, RolloutStopped)
    assert "EnvRunners were given up" in str(raised.value.cause)
    ray.kill(rollouts)


def test_tasks_without_training_are_taken_as_they_are_whole(ray_cluster: Any) -> None:
    """`play` and `take` of the manager: one task's environment always fails, and few groups may wait."""
    envs = [broken("fine"), broken("raise")]
    runner = start(envs)
    config = RolloutConfig(max_concurrent=4, max_retries=1)
    imports = {"runtime_env": IMPORTS_THIS_MODULE}
    rollouts = start_manager(config, envs, 0, 0, 0.0, [runner], Supervision(), actor_options=imports)
    tasks = [Task(i, "raise-step" if i == 3 else "fine-step", i, split="validation") for i in range(12)]
    ray.get(rollouts.play.remote(tasks, 2, 2), timeout=150)
    deadline = time.monotonic() + 200
    taken: list[Taken] = []
    while not taken or taken[-1].running or not taken[-1].episodes:
        assert time.monotonic() < deadline
        taken.append(ray.get(rollouts.take.remote(0, 0.1), timeout=60))
    # Two groups, and up to four episodes that ran then, each with one before it where groups fill up side by side.
    assert 4 <= taken[-1].episodes <= 12, "no task begins while two groups wait; those that had begun are finished"
    while not taken[-1].done:
        assert time.monotonic() < deadline
        taken.append(ray.get(rollouts.take.remote(3, 5.0), timeout=60))
    assert all(len(each.groups) <= 3 for each in taken)
    whole = [group.task.index for each in taken for group in each.groups]
    (dropped,) = [drop for each in taken for drop in each.dropped]
    assert sorted([*whole, dropped.task.index]) == list(range(12))
    assert dropped.task.index == 3
    assert dropped.cause.startswith("env_error")
    assert taken[-1].episodes == 22
    for handle in (rollouts, runner):
        ray.kill(handle)


class Watched:
    """A KeptManager whose managers can be hurt while it waits for them."""

    def __init__(self, runners: list[Any], envs: list[EnvConfig]) -> None:
        self.started: list[Any] = []
        self.runners, self.envs = runners, envs
        # Also what a manager has to start before it is taken for one that hangs.
        self.kept = KeptManager(self.start, answer_timeout_s=60.0)

    def start(self, state: SchedulerState) -> Any:
        self.started.append(manager(self.runners, self.envs, Supervision(), state))
        return self.started[-1]

    def collect_and_validate(
        self, step: int, tasks: list[Task], hurt: Callable[[Any], None]
    ) -> tuple[Collected, Collected]:
        """Both at once; the manager is hurt while it waits for episodes of both."""
        with ThreadPoolExecutor(2) as pool:
            validating = pool.submit(self.kept.validate, tasks, lambda text: None)
            collecting = pool.submit(self.collect, step)
            wait_until(lambda: self.waits_for_both() and sum(self.running()) > 0)
            hurt(self.kept.manager)
            return collecting.result(timeout=250), validating.result(timeout=250)[0]

    def collect(self, step: int) -> Collected:
        return self.kept.collect(step, lambda text: None)

    def waits_for_both(self) -> bool:
        text = ray.get(self.kept.manager.progress.remote(), timeout=60)
        return "groups whole" in text and "validation tasks" in text

    def running(self) -> list[int]:
        return ray.get([runner.running.remote() for runner in self.runners], timeout=60)


def wait_until(condition: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=only_long)])
def test_a_manager_that_dies_or_hangs_has_a_successor(ray_cluster: Any, tmp_path: Path, how: int) -> None:
    """It owed a step and a validation beside it. Both are played again, by the same runners; nothing is skipped,
    nothing comes twice, no episode is left."""
    gate = tmp_path / "gate"
    gate.touch()
    envs = [broken("fine")]
    runner = start(envs, SaysTenWhileOpen(str(gate)))
    rollouts = Watched([runner], envs)
    steps = [rollouts.collect(0)]
    gate.unlink()  # before anything of the next step may begin: none of it is over when the manager is hurt
    rollouts.kept.set_version(1)
    held_out = [Task(index, "fine-step", 1000 + index, split="validation") for index in range(6)]

    def hurt(actor: Any) -> None:
        os.kill(pid_of(actor), how)
        gate.touch()

    step, validated = rollouts.collect_and_validate(1, held_out, hurt)
    steps.append(step)
    rollouts.kept.set_version(2)
    steps.append(rollouts.collect(2))
    assert [step.manager_restarts for step in steps] == [0, 1, 0] and len(rollouts.started) == 2
    groups = [group for step in steps for group in step.groups]
    assert [group.task.index for group in groups] == list(range(12))
    assert {t.attempt for group in groups[4:] for t in group.trajectories} == {4}, "not its predecessor's episodes"
    assert not any(step.failures for step in steps)
    assert [group.task for group in validated.groups] == held_out and not validated.dropped
    assert [group.group_id for group in validated.groups] == [f"validation-1-{task.index}" for task in held_out]
    wait_until(lambda: rollouts.running() == [0])
    gate.unlink()
    with ThreadPoolExecutor(1) as pool:  # whoever waits when the run ends gets an answer, and no successor is started
        validating = pool.submit(rollouts.kept.validate, held_out, lambda text: None)
        wait_until(lambda: sum(rollouts.running()) > 0)
        rollouts.kept.close()
        assert rollouts.kept._calls == 0, "it has left"
        assert isinstance(validating.exception(timeout=60), RolloutStopped) and len(rollouts.started) == 2
    ray.kill(runner)


def test_a_runner_ends_the_episodes_of_a_manager_that_is_gone(ray_cluster: Any) -> None:
    runner = start([broken("fine")], says_ten_for_ever)
    old = [runner.run_episode.remote(Task(0, "fine-step", 3), "g", i, 3, SAMPLING) for i in range(4)]
    wait_until(lambda: ray.get(runner.running.remote(), timeout=60) == 4)
    runner.abandon_before.remote(4)
    new = runner.run_episode.remote(Task(0, "fine-step", 3), "g", 0, 4, SAMPLING)
    old.append(runner.run_episode.remote(Task(0, "fine-step", 3), "g", 0, 3, SAMPLING))
    for reference in old:
        with pytest.raises(ray.exceptions.RayTaskError) as raised:
            ray.get(reference, timeout=60)
        assert isinstance(raised.value.cause, EpisodeFailure) and raised.value.cause.kind is FailureKind.CANCELLED
    # Calls of an asynchronous actor need not begin in their order: perhaps the new one does only now.
    wait_until(lambda: ray.get(runner.running.remote(), timeout=60) == 1)
    assert not ray.wait([new], timeout=0.1)[0]
    ray.kill(runner)


@only_long
def test_managers_that_die_again_and_again_stop_the_run(ray_cluster: Any) -> None:
    kept = KeptManager(lambda state: manager([], [], Supervision()))  # its constructor raises
    with pytest.raises(
        RolloutStopped, match=r"^the RolloutManager: .*at least one environment.* loss number 4 .* allows 3 without"
    ):
        kept.collect(0, lambda text: None)
