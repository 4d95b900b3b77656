"""Whole groups and the scheduler's place on disk and back, exactly; and on the way to other options."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run_files import collected, trajectory
from test_schedule import LOST, played, scheduler

from raygym.open_group import GroupState
from raygym.rollout_state import RolloutState
from raygym.schedule import Collected, Scheduler, SchedulerState
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
    state = RolloutState(SchedulerState(restarts=3, delivered=4, slots_given=4, cursor=9))
    resumed = state.resumed(2, 2, "task")
    assert resumed.scheduler == SchedulerState(restarts=0, delivered=4, slots_given=4, cursor=9)


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
    resumed = state.resumed(1, groups_per_step, "task")
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


def test_what_is_too_far_ahead_by_now_begins_when_its_step_is_near_enough() -> None:
    """Staleness 2, then 0: after step 0 the groups of steps 1 to 3 are owed, and only those of step 1 may begin."""
    before = scheduler(max_staleness=2, max_concurrent=100, steps=9)
    for assignment in before.start()[:4]:
        before.finish(assignment, played(assignment))
    assert before.collect_step(0) is not None
    before.set_version(1)
    before.start()
    resumed = RolloutState(before.state()).resumed(1, 2, "task")
    after = scheduler(state=resumed.scheduler, max_staleness=0, max_concurrent=100, steps=9)
    for version in range(1, 5):
        started = after.start()
        assert {assignment.task.index for assignment in started} == {2 * version, 2 * version + 1}
        owed = {group.task: group for group in after.state().groups}
        assert set(owed) == set(range(2 * version, max(8, 2 * version + 2))), "what may not begin yet is still owed"
        assert owed[2 * version].admitted_at == (version if version > 1 else 0)
        for assignment in started:
            after.finish(assignment, played(assignment))
        assert after.collect_step(version) is not None
        after.set_version(version + 1)


@dataclass(frozen=True)
class Shape:
    """What of the schedule may be another after a resume."""

    groups_per_step: int
    max_staleness: int
    order: Literal["task", "completion"]
    over_sampling: float

    def options(self) -> dict[str, Any]:
        return {
            "groups_per_step": self.groups_per_step,
            "max_staleness": self.max_staleness,
            "order": self.order,
            "over_sampling": self.over_sampling if self.order == "completion" else 0.0,
            "steps": 7,
            "max_concurrent": 6,
            "max_replaced_groups": 10_000,
        }


@dataclass
class Played:
    """What a run has seen of its tasks, over all of its processes."""

    rng: random.Random
    collected: list[Collected] = field(default_factory=list)
    began: dict[str, int] = field(default_factory=dict)
    """By group, the version at its first start in the process that goes on with it."""

    def until(self, schedule: Scheduler, step: int, shape: Shape) -> Iterator[None]:
        """Go on to `step`; gives control back before each episode's end."""
        running = []
        while True:
            # After a resume, too, a step may be whole already.
            self._collect(schedule, step, shape)
            if len(self.collected) == step:
                return
            for assignment in schedule.start():
                self.began.setdefault(assignment.group_id, len(self.collected))
                running.append(assignment)
            assert running, "nothing runs although a step is missing"
            yield
            assignment = running.pop(self.rng.randrange(len(running)))
            schedule.finish(assignment, LOST if self.rng.random() < 0.2 else played(assignment))
            obsolete = schedule.obsolete()
            running = [other for other in running if other not in obsolete]
            for unwanted in obsolete:
                schedule.finish(unwanted, LOST)

    def _collect(self, schedule: Scheduler, step: int, shape: Shape) -> None:
        while (now := len(self.collected)) < step and (found := schedule.collect_step(now)) is not None:
            assert all(now - self.began[group.group_id] <= shape.max_staleness for group in found.groups)
            self.collected.append(found)
            schedule.set_version(now + 1)
            self.assert_each_once(found.state)
            slots = {group.slot for group in found.state.groups}
            if shape.order == "completion":
                assert slots <= {-1}
            else:  # one of an earlier step would be owed for ever
                assert len(slots) == len(found.state.groups)
                assert all(slot >= (now + 1) * shape.groups_per_step for slot in slots)

    def assert_each_once(self, state: SchedulerState) -> None:
        trained = [group.task.index for step in self.collected for group in step.groups]
        dropped = [drop.task.index for step in self.collected for drop in step.dropped]
        owed = [group.task for group in state.groups] + [task for task, _ in state.dropped]
        assert sorted(trained + dropped + owed) == list(range(state.cursor))


shapes = st.builds(
    Shape, st.integers(1, 4), st.integers(0, 3), st.sampled_from(["task", "completion"]), st.sampled_from([0.0, 1.0])
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), old=shapes, new=shapes, last=shapes, ends=st.integers(0, 40))
def test_another_schedule_skips_no_task_doubles_none_and_makes_none_too_stale(
    seed: int, old: Shape, new: Shape, last: Shape, ends: int
) -> None:
    """Killed at any moment and gone on with another schedule, twice."""
    run = Played(random.Random(seed))
    schedule = scheduler(**old.options())
    for step, before, shape in ((3, old, new), (5, new, last)):
        for ended, _ in enumerate(run.until(schedule, step, before)):
            if ended == ends:
                break
        state = RolloutState(schedule.state(), schedule.whole_groups())
        resumed = state.resumed(len(run.collected), shape.groups_per_step, shape.order)
        run.began = {group.group_id: run.began[group.group_id] for group in resumed.whole}
        schedule = scheduler(state=resumed.scheduler, whole=resumed.whole, **shape.options())
        still_whole = {group.group_id for group in schedule.whole_groups()}
        run.began = {group_id: version for group_id, version in run.began.items() if group_id in still_whole}
        run.assert_each_once(schedule.state())
    for _ in run.until(schedule, 7, last):
        pass
    assert len(run.collected) == 7 and len(run.collected[-1].groups) == last.groups_per_step
