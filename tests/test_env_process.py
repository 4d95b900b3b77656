"""Processes of environments that die, without a cluster: an episode may find out about one, not about each."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from raygym.actors import env_process
from raygym.actors.env_process import EnvProcesses
from raygym.config import EnvConfig
from raygym.types import EpisodeFailure, FailureKind, Message, Task

pytestmark = [pytest.mark.ray]
TASK = Task(0, "e", 3)


class Process:
    """An `EnvProcess`; it answers nothing once it is dead."""

    def __init__(self) -> None:
        self.dead = self.killed = False
        for method in ("ready", "reset", "close"):
            setattr(self, method, SimpleNamespace(remote=self._call))

    def _call(self, *_: Any) -> Any:
        answer: Future[tuple[list[Message], list[Any]]] = Future()
        if self.dead:
            answer.set_exception(RayActorError())
        else:
            answer.set_result(([], []))
        return SimpleNamespace(future=lambda: answer)


async def test_of_many_that_die_together_one_episode_finds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Process] = []

    def start(_: EnvConfig) -> Process:
        made.append(Process())
        return made[-1]

    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))
    fake = SimpleNamespace(remote=lambda _: actor, kill=lambda process: setattr(process, "killed", True))
    monkeypatch.setattr(env_process, "ray", fake)
    processes = EnvProcesses(EnvConfig(id="m:E", isolation="actor", processes=8))

    async def episode() -> None:
        async with processes.host() as host:
            await host.reset(TASK, 10)
            await host.close()

    async with AsyncExitStack() as together:
        for _ in range(6):
            await together.enter_async_context(processes.host())
    assert len(made) == 6
    for process in made:
        process.dead = process is not made[3]
    failed = 0
    for _ in range(6):
        try:
            await episode()
        except EpisodeFailure as failure:
            assert failure.kind is FailureKind.ENV_LOST
            failed += 1
    assert failed == 1, "a retry has a process that answers"
    await asyncio.gather(*(episode() for _ in range(8)))
    assert [process.killed for process in made[:6]] == [True, True, True, False, True, True]
