"""How benchmarks carry out the scheduling policies of other frameworks."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.schedule import Assignment, Scheduler, SchedulerOptions
from raygym.tasks import TaskCursor
from raygym.types import EpisodeStatus, Generation, Int32Array, Sampling, Trajectory

ANSWER = Generation(np.ones(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), "stop")
NO_TOKENS = np.empty(0, np.int32)


@pytest.fixture(scope="module")
def harness(request: pytest.FixtureRequest) -> dict[str, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
        return {name: importlib.import_module(f"harness.{name}") for name in ("lock_step", "episodes", "ideal")}


def test_lock_step_takes_the_slowest_of_each_turn(harness: dict[str, ModuleType]) -> None:
    seconds = harness["ideal"].lock_step_s
    assert seconds([[[1.0, 5.0], [3.0, 1.0]]]) == 8.0
    assert seconds([[[1.0, 5.0], [3.0]]]) == 8.0
    assert seconds([[[1.0]], [[2.0], [4.0, 1.0]]]) == 6.0


def test_whole_batches_take_the_slowest_of_each_batch(harness: dict[str, ModuleType]) -> None:
    assert harness["ideal"].whole_batches_s([[1.0, 6.0], [2.0]]) == 8.0


latencies = st.lists(st.lists(st.floats(0.001, 10), min_size=1, max_size=5), min_size=1, max_size=8)


@given(st.lists(latencies, min_size=1, max_size=3))
def test_no_bound_is_below_that_of_a_freer_policy(
    harness: dict[str, ModuleType], batches: list[list[list[float]]]
) -> None:
    ideal, places = harness["ideal"], max(map(len, batches))
    durations = [[sum(turns) for turns in batch] for batch in batches]
    together = ideal.whole_batches_s(durations)
    assert ideal.lock_step_s(batches) >= together - 1e-9
    assert together >= ideal.steady_s([s for batch in durations for s in batch], places) - 1e-9


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_no_turn_is_asked_before_all_turns_before_it_are_answered(
    harness: dict[str, ModuleType], turns: list[int]
) -> None:
    events: list[tuple[str, int]] = []

    async def generate(prompt: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        episode, turn = map(int, session_id.split("-"))
        events.append(("asked", turn))
        for _ in range(episode + 1):  # some are slower than others
            await asyncio.sleep(0)
        events.append(("answered", turn))
        return ANSWER

    async def episode(number: int) -> None:
        for turn in range(turns[number]):
            await step(NO_TOKENS, Sampling(), f"{number}-{turn}")
            await asyncio.sleep(0)
        step.leave()

    async def play() -> None:
        for _ in turns:
            step.join()
        await asyncio.wait_for(asyncio.gather(*map(episode, range(len(turns)))), 10)

    step = harness["lock_step"].LockStep(generate)
    asyncio.run(play())
    at = [turn for _, turn in events]
    assert at == sorted(at) and len(at) == 2 * sum(turns)
    for turn in range(max(turns)):
        said = [what for what, of in events if of == turn]
        assert said == ["asked"] * (len(said) // 2) + ["answered"] * (len(said) // 2)


async def test_an_episode_that_fails_or_gives_up_holds_nobody(harness: dict[str, ModuleType]) -> None:
    async def generate(prompt: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        await asyncio.sleep(0)
        if session_id == "broken":
            raise ValueError("broken")
        return ANSWER

    step = harness["lock_step"].LockStep(generate)
    for _ in range(3):
        step.join()
    fine, broken = (asyncio.ensure_future(step(NO_TOKENS, Sampling(), name)) for name in ("fine", "broken"))
    await asyncio.sleep(0)
    assert not fine.done()
    step.leave()  # the third never asked
    assert await asyncio.wait_for(fine, 10) is ANSWER
    with pytest.raises(ValueError, match="broken"):
        await broken


def options(**given: int) -> SchedulerOptions:
    return SchedulerOptions(**{"groups_per_step": 2, "group_size": 2, "steps": 4, "max_concurrent": 4, **given})


def scheduler(given: SchedulerOptions) -> Scheduler:
    return Scheduler(TaskCursor([("env", 1.0)], 0), given)


def played(assignment: Assignment) -> Trajectory:
    empty = np.empty(0, np.float32)
    return Trajectory(
        assignment.task, assignment.group_id, assignment.episode, assignment.attempt, EpisodeStatus.TERMINATED,
        NO_TOKENS, np.empty(0, np.bool_), empty, NO_TOKENS, (), 1.0, (), Sampling(),
    )  # fmt: skip


class Playing:
    """Episodes that end when they are told to."""

    def __init__(self) -> None:
        self.begun: dict[Assignment, asyncio.Future[Trajectory]] = {}

    def __call__(self, assignment: Assignment) -> Awaitable[Trajectory]:
        self.begun[assignment] = asyncio.get_running_loop().create_future()
        return self.begun[assignment]

    @property
    def running(self) -> int:
        return sum(not future.done() for future in self.begun.values())

    async def end(self, count: int) -> None:
        for assignment in [a for a, future in self.begun.items() if not future.done()][:count]:
            self.begun[assignment].set_result(played(assignment))
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_whole_batch_is_waited_for(harness: dict[str, ModuleType]) -> None:
    playing = Playing()
    episodes = harness["episodes"].Episodes(scheduler(options()), playing, 0.0)
    first = asyncio.ensure_future(episodes.step(0))
    await asyncio.sleep(0)
    await playing.end(3)
    assert playing.running == 1 and not first.done()
    await playing.end(1)
    assert [len(group.trajectories) for group in (await first).groups] == [2, 2] and playing.running == 0
    second = asyncio.ensure_future(episodes.step(1))
    await asyncio.sleep(0)
    assert playing.running == 4
    await playing.end(4)
    await second


async def test_places_stay_empty_until_the_loop_wakes_up(harness: dict[str, ModuleType]) -> None:
    playing = Playing()
    episodes = harness["episodes"].Episodes(scheduler(options(max_staleness=1)), playing, 3600.0)
    step = asyncio.ensure_future(episodes.step(0))
    for _ in range(5):
        await asyncio.sleep(0)
    assert playing.running == 4
    await playing.end(4)
    assert (await step).groups and len(playing.begun) == 4  # more may start, and does not within this hour
    await episodes.end(cancel=True)


async def test_the_loop_fills_places_when_it_wakes_up(harness: dict[str, ModuleType]) -> None:
    playing = Playing()
    episodes = harness["episodes"].Episodes(scheduler(options(max_staleness=1)), playing, 0.001)
    step = asyncio.ensure_future(episodes.step(0))
    async with asyncio.timeout(10):
        while len(playing.begun) < 8:
            await playing.end(4)
            await asyncio.sleep(0.001)
    assert (await step).groups
    await episodes.end(cancel=True)


async def test_what_goes_wrong_is_told_to_who_waits(harness: dict[str, ModuleType]) -> None:
    async def episode(assignment: Assignment) -> Trajectory:
        raise ValueError("no such episode")

    episodes = harness["episodes"].Episodes(scheduler(options()), episode, 0.0)
    with pytest.raises(ValueError, match="no such episode"):
        await asyncio.wait_for(episodes.step(0), 10)
    await episodes.end(cancel=True)
