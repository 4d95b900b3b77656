"""The RolloutManager's bookkeeping, on stand-ins for Ray's actors: no place is lost, whatever comes at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from test_schedule import played

from raygym.actors import rollout_manager
from raygym.actors.rollout_manager import RolloutManager
from raygym.config import EnvConfig, RolloutConfig
from raygym.schedule import Assignment
from raygym.types import EpisodeFailure, FailureKind, Sampling, Task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(60)]


class Client:
    """In place of an EpisodeClient: episodes end when the test says so, several in one turn of the event loop."""

    def __init__(self) -> None:
        self.playing: dict[Assignment, asyncio.Future[Any]] = {}

    async def play(self, task: Task, group: str, episode: int, attempt: int, sampling: Sampling, places: Any) -> Any:
        assignment = Assignment(group, task, episode, attempt)
        self.playing[assignment] = asyncio.get_running_loop().create_future()
        try:
            return await self.playing[assignment]
        finally:
            del self.playing[assignment]

    def end(self, outcome: Callable[[Assignment], Any], *episodes: int) -> None:
        """Of the first group that plays: these episodes, in this order."""
        group = next(iter(self.playing)).group_id
        by_number = {a.episode: a for a in self.playing if a.group_id == group}
        for episode in episodes:
            self.playing[by_number[episode]].set_result(outcome(by_number[episode]))


class Supervisor:
    """In place of a RunnerSupervisor: one runner, which is up."""

    up = 1

    async def take(self) -> int:
        return 0

    def release(self, index: int) -> None:
        pass


@pytest.fixture
async def manager(monkeypatch: pytest.MonkeyPatch) -> RolloutManager:
    monkeypatch.setattr(rollout_manager, "_AHEAD", 0.0)
    retries = {"context_overflow": 0}
    config = RolloutConfig(groups_per_step=2, group_size=2, max_concurrent=6, extra_episodes=1, retries=retries)
    made = RolloutManager(config, [EnvConfig(id="x:Y", name="a")], 0, 5, 0.0, [])
    made._supervisor, made._clients = Supervisor(), [Client()]  # type: ignore[assignment, list-item]
    return made


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def fails(kind: FailureKind) -> Callable[[Assignment], EpisodeFailure]:
    return lambda _: EpisodeFailure(kind, "as told")


async def assert_all_places_are_used(manager: RolloutManager, client: Client) -> None:
    await settle()
    assert set(manager._calls) == set(client.playing) == set(manager._scheduler._attempts)
    assert len(client.playing) == 6


async def test_a_retry_that_is_obsolete_before_it_began_leaves_its_place(manager: RolloutManager) -> None:
    client: Any = manager._clients[0]
    collected = asyncio.ensure_future(manager.collect(0))
    await settle()
    assert len(client.playing) == 6
    # In one answer: a failure, whose retry is begun at once, and the two that make the group whole without it.
    client.end(fails(FailureKind.ENV_ERROR), 0)
    client.end(played, 1, 2)
    await settle()
    assert set(manager._calls) == set(client.playing) == set(manager._scheduler._attempts)
    collected.cancel()


async def test_a_group_that_is_lost_while_its_retry_begins_leaves_its_places(manager: RolloutManager) -> None:
    client: Any = manager._clients[0]
    collected = asyncio.ensure_future(manager.collect(0))
    await settle()
    client.end(fails(FailureKind.ENV_ERROR), 0)
    client.end(fails(FailureKind.CONTEXT_OVERFLOW), 1, 2)  # one spare episode, and then the group is replaced
    await assert_all_places_are_used(manager, client)
    collected.cancel()
