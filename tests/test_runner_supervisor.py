"""What the RolloutManager's watcher tells of EnvRunners, on runners without Ray."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from raygym.actors.runner_supervisor import RunnerSupervisor, Supervision
from raygym.actors.supervisor import Supervisor
from raygym.supervision import GivenUp, Kind, PartEvent, What
from raygym.supervision_config import SupervisionConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(60)]


class Runner:
    """Answers its pings; `dead` for so many of them it does not. The answer to `late` comes when a test gives it."""

    def __init__(self, dead: int = 0, incarnation: str = "", late: int = 0) -> None:
        self.pings, self._dead, self._incarnation, self._late = 0, dead, incarnation, late
        self.answer: Future[str] = Future()
        self.ping = SimpleNamespace(remote=self._ping)

    def _ping(self) -> Any:
        self.pings += 1
        answer: Future[str] = Future()
        if self.pings == self._late:
            answer = self.answer
        elif self.pings <= self._dead:
            answer.set_exception(RayActorError(error_msg="it died"))
        else:
            answer.set_result(self._incarnation)
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


async def test_one_that_was_started_anew_while_no_manager_was_there_was_lost() -> None:
    """A node takes the manager and a runner with it: nobody is left to see that the runner was started again."""
    recorded: list[PartEvent] = []
    supervisor = Supervisor(record=recorded.append)
    supervisor.relay(await watched(Runner(incarnation="a"), Runner(incarnation="b")))
    assert recorded == []
    supervisor.relay(await watched(Runner(incarnation="a"), Runner(incarnation="c")))
    assert [(event.name, event.what) for event in recorded] == [("EnvRunner 1", "lost"), ("EnvRunner 1", "recovered")]
    assert "while nothing watched it" in recorded[0].cause and supervisor.restarts == {"env_runner": 1}
    supervisor.relay(await watched(Runner(incarnation="a"), Runner(incarnation="c")))
    assert len(recorded) == 2


async def test_one_that_was_lost_unseen_counts_against_the_budget() -> None:
    supervisor = Supervisor(SupervisionConfig(env_runner_restarts=0))
    supervisor.relay(await watched(Runner(incarnation="a")))
    with pytest.raises(GivenUp, match="env_runner_restarts allows 0"):
        supervisor.relay(await watched(Runner(incarnation="b")))


async def test_each_answers_for_the_first_time_once() -> None:
    events = await watched(Runner(), Runner(dead=2), pings=5)
    assert [event.what for event in events if event.name == "EnvRunner 0"] == [What.RECOVERED]
    assert [event.what for event in events if event.name == "EnvRunner 1"] == [What.LOST, What.RECOVERED]


async def test_one_that_starts_slowly_is_not_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Runner] = []
    monkeypatch.setattr(ray, "kill", lambda runner, no_restart: killed.append(runner))
    slow, hung = Runner(dead=2, late=3), Runner(late=2)
    supervision = Supervision(ping_every_s=0.01, first_wait_s=0.01, ping_timeout_s=0.05, start_timeout_s=60.0)
    supervisor = RunnerSupervisor([slow, hung], supervision)
    try:
        async with asyncio.timeout(30):
            while hung not in killed or slow.pings < 3:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert killed == [hung] and slow.pings == 3 and supervisor.states() == [False, True]
        slow.answer.set_result("")
        async with asyncio.timeout(30):
            while not all(supervisor.states()):
                await asyncio.sleep(0.01)
    finally:
        for watcher in supervisor._watchers:
            watcher.cancel()
