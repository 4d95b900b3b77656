"""Environments: starting them, many light episodes at once in one EnvRunner, and what a turn costs beside its method.

The policy answers at once from inside the runner (simulated: no engine, no tokens of a model), so that what is measured
is raygym's own. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from harness import calibrate, report

from raygym.actors.env_runner import EnvRunner
from raygym.config import EnvConfig
from raygym.env import make_env
from raygym.env_host import EnvHost
from raygym.episode import EpisodeLimits
from raygym.models import resolve_policy
from raygym.types import Generation, Sampling, Task

_GUESS = EnvConfig(id="raygym/NumberGuess-v0", name="guess")
_TURNS = 4
_LIMITS = EpisodeLimits(
    max_turns=_TURNS,
    max_tokens_per_turn=8,
    max_model_len=2048,
    turn_timeout_s=300,
    step_timeout_s=300,
    episode_timeout_s=600,
)


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition and fewer episodes")
    options = parser.parse_args()
    calibrate()
    repetitions, concurrent = (1, 500) if options.quick else (3, 2000)
    samples: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for key, value in asyncio.run(measure(concurrent)).items():
            # Only the first repetition starts with the memory of none of the others.
            if key != "kib_per_episode" or key not in samples:
                samples.setdefault(key, []).append(value)
    report("environments", samples, config=f"{concurrent} episodes at once, NumberGuess, {_TURNS} turns, one process")


async def measure(concurrent: int) -> dict[str, float]:
    """One sample of everything."""
    started = time.perf_counter()
    hosts = [EnvHost(partial(make_env, _GUESS.id, _GUESS.kwargs)) for _ in range(100)]
    await asyncio.gather(*(host.reset(Task(i, "guess", i), 60) for i, host in enumerate(hosts)))
    start_100_s = time.perf_counter() - started
    turn_us = await turn_overhead_us()
    await asyncio.gather(*(host.close() for host in hosts))
    return {"start_100_environments_s": start_100_s, "turn_over_method_us": turn_us, **await episodes(concurrent)}


async def turn_overhead_us(turns: int = 2000) -> float:
    """Microseconds of a step through its host (deadline, thread, checks) beyond the environment's own method."""
    env: Any = make_env("raygym/Arithmetic-v0", {})
    env.reset(seed=1)
    action = {"role": "assistant", "content": "12"}
    started = time.perf_counter()
    for _ in range(turns):
        env.step(dict(action))
    direct = time.perf_counter() - started
    light = EnvHost(partial(make_env, "raygym/Arithmetic-v0", {}))
    await light.reset(Task(0, "sums", 1), 60)
    started = time.perf_counter()
    for _ in range(turns):
        await light.step(dict(action), 60)
    hosted = time.perf_counter() - started
    await light.close()
    return (hosted - direct) / turns * 1e6


async def episodes(concurrent: int) -> dict[str, float]:
    """So many episodes at once through one EnvRunner, whose policy answers after 100 ms."""
    answers = [np.asarray([20 + i, 2], np.int32) for i in range(8)]

    async def answer(prompt: Any, sampling: Sampling, session_id: str) -> Generation:
        await asyncio.sleep(0.1)
        ids = answers[len(prompt) % 8]
        return Generation(ids, np.full(len(ids), -0.5, np.float32), np.zeros(len(ids), np.int32), "stop")

    runner = EnvRunner([_GUESS], str(Path(resolve_policy("tiny"))), _LIMITS, run_seed=0, generate=answer)
    process = psutil.Process()
    before, cpu, started = process.memory_info().rss, sum(process.cpu_times()[:2]), time.perf_counter()
    calls = (runner.run_episode(Task(i, "guess", i), f"g{i}", 0, 0, Sampling()) for i in range(concurrent))
    playing = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(1.0)  # all are under way, none is over
    grown = process.memory_info().rss - before
    trajectories = await asyncio.gather(*playing)
    seconds = time.perf_counter() - started
    assert all(trajectory.failure is None for trajectory in trajectories), "an episode failed"
    turns = sum(len(trajectory.turns) for trajectory in trajectories)
    return {
        "episodes_at_once_s": seconds,
        "turns_per_s": turns / seconds,
        "cpu_ms_per_turn": (sum(process.cpu_times()[:2]) - cpu) / turns * 1000,
        "kib_per_episode": grown / 1024 / concurrent,
    }


if __name__ == "__main__":
    main()
