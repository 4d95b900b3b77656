"""Rollouts whose processes are killed and hang, and whose environments raise and block, beside the same without faults.

The engine is **simulated**; everything else is what a run has: two replicas of the PolicyServer behind Serve, two
EnvRunners, and a RolloutManager with successors. At seeded moments a replica is killed, another hangs, an EnvRunner
and the RolloutManager are killed; of the episodes 5 % raise and 1 % block, most of them so that a retry helps, and 1 %
of the tasks so that nothing does and their group must be replaced. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from harness import calibrate, report
from harness.agents import Agents
from harness.faults import Fault, Injector, draw_faults
from harness.faulty import TURN_REWARD
from harness.rollout_stack import IMPORTS
from harness.timed import TimedManager, TimedTurns
from harness.waits import Wait, WaitLog, longest_s
from ray import serve

from raygym.actors import cluster, serving
from raygym.actors.env_runner import start_env_runner
from raygym.actors.kept_manager import KeptManager
from raygym.actors.policy_server import DEPLOYMENT
from raygym.config import EnvConfig, PolicyConfig, RolloutConfig, SessionsConfig
from raygym.episode import EpisodeLimits
from raygym.models import resolve_policy
from raygym.schedule import Collected, SchedulerState
from raygym.types import Trajectory

TURNS = 4
TURN_LATENCY_S = 0.3
MAX_TOKENS = 16
CONFIG = RolloutConfig(
    groups_per_step=32,
    group_size=4,
    max_concurrent=64,
    max_turns=TURNS,
    max_tokens_per_turn=MAX_TOKENS,
    env_runners=2,
    # Four attempts must outlast a time without any engine: the faults may fall together.
    turn_timeout_s=10,
    step_timeout_s=2,
    episode_timeout_s=30,
    # For a while there may be no replica at all, and what is asked is whether everything comes back then.
    max_failures_in_a_row=10_000,
    max_replaced_groups=1_000,
)
FAULTY = {"raise_rate": 0.04, "hang_rate": 0.01, "lost_tasks": 0.01, "hang_s": 8.0}
_APP = "rollout-faults"
_SETTLED_WITHIN_S = 30.0
_AGENTS = 2
_SESSION_TTL_S = 10.0
_OPEN_SESSIONS = re.compile(r"^raygym_open_sessions ([0-9.]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of all steps gave and what it left."""

    steps: list[Collected]
    step_s: list[float]
    waits: list[Wait]
    faults: list[Fault]
    left: Left
    sessions: tuple[int, int]
    """Of the agents beside: closed, and left open after a call that failed."""

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return sum(self.step_s)

    @property
    def trajectories(self) -> list[Trajectory]:
        """All that were delivered."""
        return [t for step in self.steps for group in step.groups for t in group.trajectories]


@dataclass(frozen=True, slots=True)
class Left:
    """What is still there when everything is collected."""

    requests: int
    """In the replicas, running or waiting."""
    episodes: int
    """In the EnvRunners, running or waiting."""
    env_threads: int
    """Of environments, in the EnvRunner that has the most."""
    tasks: int
    """Of asyncio, in the EnvRunner that has the most."""
    sessions: int
    """Recorded over HTTP, in the replicas."""
    replicas: int
    """That answer."""


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the episodes")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments and victims of the faults")
    options = parser.parse_args()
    calibrate()
    steps, hung_s = (3, 10.0) if options.quick else (12, 30.0)
    plain = run(steps, {}, [], options.seed)
    faults = draw_faults(options.seed, plain.seconds, hung_s)
    faulty = run(steps, FAULTY, faults, options.seed)
    samples = {key: [value] for key, value in measured(plain, faulty).items()}
    report(
        "rollout_faults",
        samples,
        config=f"simulated engine, {TURN_LATENCY_S} s and {TURNS} turns, {CONFIG.max_concurrent} episodes at once",
        faults=[
            f"{f.at_s:.1f} s: {f.victim} {f'hangs {f.hung_s:.0f} s' if f.hung_s else 'killed'}" for f in faulty.faults
        ],
        failures=sums([step.failures for step in faulty.steps]),
        replaced=sorted({drop.cause for step in faulty.steps for drop in step.dropped}),
    )


def measured(plain: Run, faulty: Run) -> dict[str, float]:
    """All metrics. Those that must be 1 or 0 are so whatever the machine; the others are its times."""
    attempts = [wait for wait in faulty.waits if wait.what == "attempt"]
    # The manager's own deadline of a call to a runner: an episode, and one more that it may wait for a place.
    attempt_deadline_s = 2 * CONFIG.episode_timeout_s
    waits = [
        longest_s(faulty.waits, "turn") / CONFIG.turn_timeout_s,
        longest_s(faulty.waits, "attempt") / attempt_deadline_s,
        max(turn.env_s for t in faulty.trajectories for turn in t.turns) / CONFIG.step_timeout_s,
    ]
    return {
        "episodes": len(faulty.trajectories),
        "groups_completed_or_replaced_share": accounted(faulty.steps),
        "groups_replaced": sum(len(step.dropped) for step in faulty.steps),
        "failures_scored": scored(faulty),
        "failed_attempts_share": sum(bool(wait.outcome) for wait in attempts) / len(attempts),
        "manager_restarts": sum(step.manager_restarts for step in faulty.steps),
        "longest_wait_over_deadline": max(waits),
        "longest_turn_s": longest_s(faulty.waits, "turn"),
        "longest_attempt_s": longest_s(faulty.waits, "attempt"),
        "longest_step_s": max(faulty.step_s),
        "leaked_requests": faulty.left.requests,
        "leaked_episodes": faulty.left.episodes,
        "leaked_sessions": faulty.left.sessions,
        "sessions_closed": faulty.sessions[0],
        "sessions_given_up": faulty.sessions[1],
        "env_threads_left": faulty.left.env_threads,
        "env_threads_left_no_faults": plain.left.env_threads,
        "leaked_tasks": max(0, faulty.left.tasks - plain.left.tasks),
        "replicas_left": faulty.left.replicas,
        "seconds": faulty.seconds,
        "seconds_over_no_faults": faulty.seconds / plain.seconds,
    }


def accounted(steps: list[Collected]) -> float:
    """Tasks that were delivered or dropped with a cause, each counted once, over those that were handed out."""
    delivered = [group.task.index for step in steps for group in step.groups]
    dropped = [drop.task.index for step in steps for drop in step.dropped if drop.cause]
    once = len(set(delivered + dropped)) - (len(delivered + dropped) - len(set(delivered + dropped)))
    whole = all(len(step.groups) == CONFIG.groups_per_step for step in steps)
    return once / steps[-1].state.cursor if whole else 0.0


def scored(run: Run) -> int:
    """Delivered trajectories that are not what an episode without trouble is, by themselves or by the log."""
    failed = {(w.group_id, w.episode, w.attempt) for w in run.waits if w.what == "attempt" and w.outcome}
    return sum(
        t.failure is not None
        or [turn.reward for turn in t.turns] != [TURN_REWARD] * TURNS
        or t.reward != TURN_REWARD * TURNS
        or (t.group_id, t.episode, t.attempt) in failed
        for t in run.trajectories
    )


def sums(counts: list[dict[str, int]]) -> dict[str, int]:
    """The sum of each key."""
    return {
        key: sum(count.get(key, 0) for count in counts) for key in sorted({key for count in counts for key in count})
    }


def run(steps: int, env_kwargs: dict[str, Any], faults: list[Fault], seed: int) -> Run:
    """All steps, one after the other."""
    with tempfile.TemporaryDirectory(prefix="rg") as directory:
        log = str(Path(directory) / "waits.jsonl")
        with started(steps, env_kwargs, log) as (manager, runners, url):
            collected, step_s = [], []
            injector = Injector(faults, seed)
            with Agents(url, _AGENTS, CONFIG.turn_timeout_s) as agents:
                injector.start()
                for step in range(steps):
                    begun = time.perf_counter()
                    manager.set_version(step)
                    collected.append(manager.collect(step, lambda text: None))
                    step_s.append(time.perf_counter() - begun)
                injector.stop()
            left = settled(runners)
        sessions = agents.closed, agents.given_up
        return Run(collected, step_s, WaitLog(log).read(), injector.done, left, sessions)


@contextmanager
def started(steps: int, env_kwargs: dict[str, Any], log: str) -> Iterator[tuple[KeptManager, list[Any], str]]:
    """The stack, warm; afterwards no process of it may be left."""
    policy = PolicyConfig(
        model="tiny",
        engine="simulated",
        replicas=2,
        sessions=SessionsConfig(ttl_s=_SESSION_TTL_S),
        simulated={"turn_latency_s": TURN_LATENCY_S, "max_model_len": 4096},
    )
    model_dir = str(resolve_policy("tiny"))
    env = EnvConfig(id="harness.faulty:Faulty", name="faulty", kwargs={"turns": TURNS, **env_kwargs})
    limits = EpisodeLimits.of(CONFIG, 4096)

    def start(state: SchedulerState) -> Any:
        options = {"num_cpus": 0, "max_concurrency": 16, "runtime_env": IMPORTS}
        actor: Any = ray.remote(TimedManager).options(**options)  # type: ignore[attr-defined]
        return actor.remote(log, CONFIG, [env], 0, steps, 0.0, runners, state=state)

    cluster.connect()
    try:
        serving.deploy(_APP, policy, model_dir, port := cluster.http_port(policy.http))
        turns = TimedTurns(DEPLOYMENT, serving.app_name(_APP), log)
        runners = [
            start_env_runner(
                [env],
                model_dir,
                limits,
                0,
                generate=turns,
                max_concurrent=CONFIG.max_concurrent,
                runtime_env=IMPORTS,
            )
            for _ in range(CONFIG.env_runners)
        ]
        ray.get([runner.ping.remote() for runner in runners], timeout=120)
        yield KeptManager(start), runners, f"http://{policy.http.host}:{port}"
        family = psutil.Process().children(recursive=True)
    finally:
        serving.undeploy(_APP)
        cluster.disconnect()
    _, alive = psutil.wait_procs(family, timeout=_SETTLED_WITHIN_S)
    assert not alive, f"left behind: {[process.cmdline() for process in alive]}"


def settled(runners: list[Any]) -> Left:
    """What is left once nothing that may still end by itself is there: a blocked step ends after `hang_s`."""
    deadline = time.monotonic() + _SETTLED_WITHIN_S
    while True:
        left = _left(runners)
        if (
            not (left.requests or left.episodes or left.sessions or left.env_threads > 16)
            or time.monotonic() > deadline
        ):
            return left
        time.sleep(0.2)


def _left(runners: list[Any]) -> Left:
    handle = serve.get_deployment_handle(DEPLOYMENT, serving.app_name(_APP))
    replicas = handle.broadcast("metrics").results(timeout_s=_SETTLED_WITHIN_S)
    inside = ray.get([runner.__ray_call__.remote(_inside) for runner in runners], timeout=_SETTLED_WITHIN_S)
    episodes = ray.get([runner.running.remote() for runner in runners], timeout=_SETTLED_WITHIN_S)
    return Left(
        requests=sum(running for *_, running in replicas),
        sessions=sum(int(float(found)) for _, text, *_ in replicas for found in _OPEN_SESSIONS.findall(text)),
        episodes=sum(episodes),
        env_threads=max(threads for threads, _ in inside),
        tasks=max(tasks for _, tasks in inside),
        replicas=len(replicas),
    )


def _inside(runner: Any) -> tuple[int, int]:
    """In an EnvRunner, though not in its event loop: its environments' threads, and its event loop's tasks."""
    loop = runner._generate.loop
    threads = sum(thread.name == "raygym-env" for thread in threading.enumerate())
    return threads, len(asyncio.all_tasks(loop)) if loop else 0


if __name__ == "__main__":
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    main()
