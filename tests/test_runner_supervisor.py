"""What the RolloutManager's watcher tells of EnvRunners, on runners without Ray."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from raygym.actors.runner_supervisor import RunnerSupervisor, Supervision
from raygym.actors.supervisor import Supervisor
from raygym.supervision import Kind, PartEvent, What

pytestmark = [pytest.mark.ray, pytest.mark.timeout(60)]


class Runner:
    """Answers its pings; `dead` for so many of them it does not."""

    def __init__(self, dead: int = 0) -> None:
        self.pings, self._dead = 0, dead
        self.ping = SimpleNamespace(remote=self._ping)

    def _ping(self) -> Any:
        self.pings += 1
        answer: Future[None] = Future()
        if self.pings <= self._dead:
            answer.set_exception(RayActorError(error_msg="it died"))
        else:
            answer.set_result(None)
        return SimpleNamespace(future=lambda: answer)


async def watched(*runners: Runner, pings: int = 3) -> list[PartEvent]:
    supervisor = RunnerSupervisor(runners, Supervision(ping_every_s=0.01, first_wait_s=0.01))
    try:
        async with asyncio.timeout(30):
            while min(runner.pings for runner in runners) < pings:
                await asyncio.sleep(0.01)
    finally:
        for watcher in supervisor._watchers:
            watcher.cancel()
    return list(supervisor.take_events())


async def test_one_that_was_lost_under_the_manager_before_is_back_when_it_answers_this_one() -> None:
    """The next loss of that runner would otherwise be counted from the first one."""
    recorded: list[PartEvent] = []
    supervisor = Supervisor(record=recorded.append)
    supervisor.lost(Kind.ENV_RUNNER, "EnvRunner 1", "it died")
    supervisor.relay(await watched(Runner(), Runner()))
    assert [(event.name, event.what) for event in recorded] == [("EnvRunner 1", "lost"), ("EnvRunner 1", "recovered")]
    assert supervisor.down() == []


async def test_each_answers_for_the_first_time_once() -> None:
    events = await watched(Runner(), Runner(dead=2), pings=5)
    assert [event.what for event in events if event.name == "EnvRunner 0"] == [What.RECOVERED]
    assert [event.what for event in events if event.name == "EnvRunner 1"] == [What.LOST, What.RECOVERED]
