"""Episodes that are given up leave nothing behind: no environment, no thread, no request."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from test_episode import END, TASK, WARM, generation, renderer  # noqa: F401 - the fixture
from tiers import LONG

from raygym import env_host
from raygym.chat import ChatRenderer
from raygym.env import ChatEnv
from raygym.env_host import EnvHost
from raygym.episode import EpisodeLimits, run_episode

LIMITS = EpisodeLimits(
    max_turns=4,
    max_tokens_per_turn=8,
    max_model_len=2048,
    turn_timeout_s=30,
    step_timeout_s=30,
    episode_timeout_s=60,
)
ABORTED = 10_000 if LONG else 200
AT_ONCE = 200


def held_threads() -> int:
    """Without those that wait for the next environments, whose number depends on the tests before, and the machine."""
    return threading.active_count() - env_host._idle.qsize()


class Counted(ChatEnv):
    alive: ClassVar[weakref.WeakSet[Counted]] = weakref.WeakSet()
    closed = 0

    def __init__(self) -> None:
        Counted.alive.add(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Go.", {}

    def step(self, action):
        time.sleep(0.001)
        return "On.", 0.0, False, False, {}

    def close(self):
        Counted.closed += 1


async def test_thousands_of_aborted_episodes(renderer: ChatRenderer) -> None:  # noqa: F811
    rng = np.random.default_rng(0)
    requests = 0

    async def generate(prompt: Any, sampling: Any, session_id: str) -> Any:
        nonlocal requests
        requests += 1
        try:
            await asyncio.sleep(0.005)
            return generation([20, END])
        finally:
            requests -= 1

    async def aborted(index: int) -> str:
        playing = asyncio.ensure_future(
            run_episode(
                EnvHost(Counted),
                TASK,
                group_id="g",
                episode=index,
                attempt=0,
                renderer_for=lambda tools: renderer,
                generate=generate,
                limits=LIMITS,
                sampling=WARM,
                run_seed=0,
            )
        )
        # At any moment: before the environment is made, in a step, in a generation, after the end.
        await asyncio.sleep(float(rng.uniform(0, 0.03)))
        playing.cancel()
        (outcome,) = await asyncio.gather(playing, return_exceptions=True)
        return "cancelled" if isinstance(outcome, BaseException) else ""

    threads = held_threads()
    made = 0
    for start in range(0, ABORTED, AT_ONCE):
        outcomes = await asyncio.gather(*(aborted(start + i) for i in range(AT_ONCE)))
        made += len(outcomes)
        assert "cancelled" in outcomes
    assert made == ABORTED
    deadline = time.monotonic() + 60
    while (held_threads() > threads or Counted.alive) and time.monotonic() < deadline:
        gc.collect()
        await asyncio.sleep(0.05)
    assert requests == 0
    assert held_threads() <= threads
    assert len(Counted.alive) == 0
    assert Counted.closed > 0
    assert len(asyncio.all_tasks()) == 1


class Native(ChatEnv):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Go.", {}

    async def step(self, action):
        return "On.", 1.0, True, False, {}


class NativeWithClose(Native):
    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def close(self):
        assert threading.get_ident() == self.thread


def test_stacks_of_idle_threads_are_no_memory() -> None:
    """Their 8 MiB each would use up a limit of memory by themselves."""
    program = """
import asyncio, resource, time
from raygym.env_host import EnvHost
from raygym.memory_limit import limit_memory
from raygym.types import Task
from raygym.env import ChatEnv

class Plain(ChatEnv):
    def reset(self, *, seed=None, options=None):
        return "Go.", {}

    def step(self, action):
        return "On.", 0.0, True, False, {}

async def main():
    limit_memory(400)
    before = resource.getrlimit(resource.RLIMIT_DATA)[0]
    hosts = [EnvHost(Plain) for _ in range(200)]
    await asyncio.gather(*(host.reset(Task(0, "x", 3), 30) for host in hosts))
    try:
        held = bytearray(450 << 20)
    except MemoryError:
        held = bytearray(100 << 20)
    print(len(held) >> 20)
    await asyncio.gather(*(host.close() for host in hosts))
    deadline = time.monotonic() + 60
    kept = 17 * resource.getrlimit(resource.RLIMIT_STACK)[0]
    while resource.getrlimit(resource.RLIMIT_DATA)[0] > before + kept and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    print(resource.getrlimit(resource.RLIMIT_DATA)[0] <= before + kept)

asyncio.run(main())
"""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=110)
    assert done.stdout.split() == ["100", "True"], done.stderr[-2000:]


async def test_environments_whose_turns_are_coroutines_hold_no_thread() -> None:
    threads = held_threads()
    hosts = [EnvHost(Native) for _ in range(100)]
    await asyncio.gather(*(host.reset(TASK, 30) for host in hosts))
    deadline = time.monotonic() + 60
    while held_threads() > threads and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert held_threads() <= threads
    assert env_host._idle.qsize() <= 16, "more than those that are kept for the next environments"
    action = {"role": "assistant", "content": ""}
    assert [(await host.step(action, 30)).reward for host in hosts] == [1.0] * 100
    for host in hosts:
        await host.close()
    # One that has something to close needs the thread that it was made in.
    closing = EnvHost(NativeWithClose)
    await closing.reset(TASK, 30)
    await closing.close()
    assert not closing.close_problem
