"""The scheduler under any interleaving of finishing, failing and updating."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.schedule import Assignment, Collected, RolloutStopped, Scheduler
from raygym.tasks import TaskCursor, validation_tasks
from raygym.types import EpisodeFailure, EpisodeStatus, FailureKind, Sampling, Trajectory

ENVS = [("a", 1.0), ("b", 2.0)]


def scheduler(**changes: Any) -> Scheduler:
    options = {
        "groups_per_step": 2,
        "group_size": 2,
        "steps": 3,
        "max_concurrent": 3,
        "max_staleness": 0,
        "max_retries": 1,
        "max_replaced_groups": 5,
    }
    return Scheduler(TaskCursor(ENVS, seed=0), **(options | changes))


def played(assignment: Assignment) -> Trajectory:
    empty = np.empty(0)
    return Trajectory(
        task=assignment.task,
        group_id=assignment.group_id,
        episode=assignment.episode,
        attempt=assignment.attempt,
        status=EpisodeStatus.TERMINATED,
        token_ids=empty.astype(np.int32),
        loss_mask=empty.astype(np.bool_),
        logprobs=empty.astype(np.float32),
        weight_versions=empty.astype(np.int32),
        turns=(),
        reward=1.0,
        messages=(),
        sampling=Sampling(),
    )


LOST = EpisodeFailure(FailureKind.ENV_LOST, "gone")


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    failure_rate=st.floats(0, 0.4),
    max_staleness=st.integers(0, 3),
    max_concurrent=st.integers(1, 12),
    groups_per_step=st.integers(1, 4),
    group_size=st.integers(2, 4),
)
def test_any_interleaving_delivers_every_task_once(
    seed: int, failure_rate: float, max_staleness: int, max_concurrent: int, groups_per_step: int, group_size: int
) -> None:
    steps, rng = 4, random.Random(seed)
    schedule = scheduler(
        steps=steps,
        max_staleness=max_staleness,
        max_concurrent=max_concurrent,
        groups_per_step=groups_per_step,
        group_size=group_size,
        max_replaced_groups=10_000,
    )
    running: list[Assignment] = []
    version, collected, started_at = 0, list[Collected](), dict[str, int]()
    while version < steps:
        for assignment in schedule.start():
            started_at.setdefault(assignment.group_id, version)
            running.append(assignment)
        assert schedule.running == len(running) <= max_concurrent
        assert running, "nothing runs although a step is missing"
        assignment = running.pop(rng.randrange(len(running)))
        obsolete = schedule.finish(assignment, LOST if rng.random() < failure_rate else played(assignment))
        assert set(obsolete) <= set(running)
        # With staleness the next step may be whole already.
        while version < steps and (step := schedule.collect_step(version)) is not None:
            for group in step.groups:
                assert [t.episode for t in group.trajectories] == list(range(group_size))
                assert version - started_at[group.group_id] <= max_staleness
            collected.append(step)
            version += 1
            schedule.set_version(version)
    trained = [group.task.index for step in collected for group in step.groups]
    dropped = [drop.task.index for step in collected for drop in step.dropped]
    assert len(trained) == steps * groups_per_step
    # Exactly once: nothing of the order is skipped, nothing comes twice.
    assert sorted(trained + dropped) == list(range(len(trained) + len(dropped)))


def test_a_failed_episode_is_retried_then_its_group_replaced() -> None:
    schedule = scheduler(max_concurrent=4)
    first, sibling, *others = schedule.start()
    assert (first.group_id, first.attempt) == (sibling.group_id, 0)
    assert schedule.finish(first, LOST) == []
    (retry,) = schedule.start()
    assert retry == Assignment(first.group_id, first.task, first.episode, 1)
    assert schedule.finish(retry, LOST) == [sibling]
    replacement = schedule.start()
    assert {a.task.index for a in replacement} == {2}
    schedule.finish(sibling, played(sibling))  # too late: it belongs to no group any more
    for assignment in others + replacement + schedule.start():
        schedule.finish(assignment, played(assignment))
    step = schedule.collect_step(0)
    assert step is not None
    assert [group.task.index for group in step.groups] == [2, 1]
    assert [(drop.task.index, drop.cause) for drop in step.dropped] == [(0, "env_lost: gone")]
    assert step.failures == {"env_lost": 2}


def test_an_environment_that_always_fails_stops_the_run_with_its_name() -> None:
    schedule = scheduler(max_retries=0, max_replaced_groups=3)
    with pytest.raises(RolloutStopped, match=r"4 groups in a row.*environment '[ab]'.*env_lost: gone"):
        while True:
            for assignment in schedule.start():
                schedule.finish(assignment, LOST)


def test_validation_goes_first_and_its_failures_are_not_replaced() -> None:
    schedule = scheduler(max_retries=0, max_concurrent=2)
    waiting = schedule.start()
    schedule.add_validation(validation_tasks(ENVS, 3))
    for assignment in waiting:
        schedule.finish(assignment, played(assignment))
    first, second = schedule.start()
    assert {first.task.split, second.task.split} == {"validation"}
    schedule.finish(first, LOST)
    schedule.finish(second, played(second))
    assert schedule.collect_validation() is None
    third = next(a for a in schedule.start() if a.task.split == "validation")
    schedule.finish(third, played(third))
    result = schedule.collect_validation()
    assert result is not None
    assert [group.task.index for group in result.groups] == [1, 2]
    assert [drop.task.index for drop in result.dropped] == [0]
