"""Whole groups and the scheduler's place on disk and back, exactly; and on the way to other options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_run_files import collected, trajectory
from test_schedule import played, scheduler

from raygym.open_group import GroupState
from raygym.rollout_state import RolloutState
from raygym.schedule import SchedulerState
from raygym.types import Group, Task


def assert_same(group: Group, other: Group) -> None:
    assert (group.group_id, group.task) == (other.group_id, other.task)
    for mine, its in zip(group.trajectories, other.trajectories, strict=True):
        for name in type(mine).__slots__:
            a, b = getattr(mine, name), getattr(its, name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name
            else:
                assert a == b, name


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    groups = collected().groups
    odd = replace(
        trajectory(Task(9, "a", 3), 0, 1 / 3, turns=1),
        logprobs=np.asarray([0, 0, -1 / 3, -1e-30], np.float32),
        metrics={"score": float(np.float64(0.1))},
        reward_components={"größe\n": 1 / 3, "": -0.0, "tiny": 5e-324, "numpy": np.float64(0.1)},
        messages=({"role": "assistant", "content": None, "tool_calls": [{"id": "é", "function": {"name": "f"}}]},),
    )
    whole = (*groups, Group("train-9", odd.task, (odd, trajectory(odd.task, 1, 0.0))))
    RolloutState(collected().state, whole).save(tmp_path)
    loaded = RolloutState.load(tmp_path)
    assert loaded.scheduler == collected().state
    for mine, its in zip(whole, loaded.whole, strict=True):
        assert_same(mine, its)


def test_a_field_that_a_checkpoint_lacks_has_its_default(tmp_path: Path) -> None:
    RolloutState(collected().state, collected().groups).save(tmp_path)
    path = tmp_path / "rollouts.json"
    data = json.loads(path.read_text())
    for record in (record for records in data["whole"] for record in records):
        del record["reward_components"], record["failure_detail"]
    path.write_text(json.dumps(data))
    for mine, its in zip(collected().groups, RolloutState.load(tmp_path).whole, strict=True):
        assert_same(mine, its)


def test_nothing_whole_and_what_cannot_be_written(tmp_path: Path) -> None:
    RolloutState(collected().state).save(tmp_path)
    assert RolloutState.load(tmp_path) == RolloutState(collected().state)
    task = Task(0, "a", 5)
    strange = replace(trajectory(task, 0, 1.0), messages=({"role": "user", "content": object()},))
    RolloutState(whole=(Group("train-0", task, (strange,)), collected().groups[1])).save(tmp_path)
    assert [group.group_id for group in RolloutState.load(tmp_path).whole] == ["train-1"], "the other is played again"


def test_a_new_process_numbers_its_attempts_from_0() -> None:
    state = RolloutState(SchedulerState(restarts=3, delivered=4, cursor=9))
    resumed = state.resumed(2, 2, 2)
    assert resumed.scheduler == SchedulerState(restarts=0, delivered=4, cursor=9)


@pytest.mark.parametrize("groups_per_step", [1, 2, 3])
def test_steps_of_another_size_begin_where_the_old_ones_ended(groups_per_step: int) -> None:
    """Staleness 1: after step 0 the groups of steps 1 and 2 are in play, one of them whole."""
    before = scheduler(max_staleness=1, max_concurrent=100, steps=9)
    for assignment in before.start()[:6]:
        before.finish(assignment, played(assignment))
    assert before.collect_step(0) is not None
    before.set_version(1)
    before.start()
    state = RolloutState(before.state(), before.whole_groups())
    assert [group.task.index for group in state.whole] == [2]
    resumed = state.resumed(1, 2, groups_per_step)
    after = scheduler(
        state=resumed.scheduler, whole=resumed.whole, max_staleness=1, max_concurrent=100, steps=9,
        groups_per_step=groups_per_step,
    )  # fmt: skip
    trained = []
    for step in range(1, 5):
        for assignment in after.start():
            after.finish(assignment, played(assignment))
        collection = after.collect_step(step)
        assert collection is not None, f"step {step} never comes"
        trained += [group.task.index for group in collection.groups]
        after.set_version(step + 1)
    assert trained == list(range(2, 2 + 4 * groups_per_step))


@pytest.mark.parametrize(
    "changes", [{"group_size": 3}, {"max_staleness": 0}, {}], ids=["other size", "too stale", "unchanged"]
)
def test_a_group_that_does_not_fit_any_more_is_played_again(changes: dict[str, int]) -> None:
    task = scheduler()._cursor.task(0)
    trajectories = tuple(trajectory(task, episode, 1.0) for episode in range(2))
    state = SchedulerState(version=1, cursor=4, delivered=2, slots_given=4, groups=(GroupState(0, 2, 0),))
    whole = (Group("train-0", task, trajectories),)
    after = scheduler(state=state, whole=whole, **({"max_staleness": 1, "max_concurrent": 100} | changes))
    again = "train-0" in {assignment.group_id for assignment in after.start()}
    assert again is bool(changes)
    assert (after.whole_groups() == ()) is again


def test_a_group_of_another_task_is_not_taken() -> None:
    task = Task(0, "a", 12345)
    whole = (Group("train-0", task, (trajectory(task, 0, 1.0), trajectory(task, 1, 0.0))),)
    state = SchedulerState(cursor=1, slots_given=1, groups=(GroupState(0, 0, 0),))
    assert scheduler(state=state, whole=whole).whole_groups() == ()
