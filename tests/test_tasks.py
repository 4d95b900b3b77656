"""The order of tasks: seeded, unique, weighted, resumable."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygym.tasks import TaskCursor, turn_seed, validation_tasks
from raygym.types import Task

ENVS = [("guess", 3.0), ("sums", 1.0)]


def take(cursor: TaskCursor, n: int) -> list[Task]:
    return [cursor.next() for _ in range(n)]


@given(seed=st.integers(0, 2**40), before=st.integers(0, 300), after=st.integers(1, 50))
def test_restored_cursor_goes_on_exactly(seed, before, after):
    cursor = TaskCursor(ENVS, seed)
    take(cursor, before)
    restored = TaskCursor.from_state(ENVS, seed, cursor.state())
    assert take(restored, after) == take(cursor, after)


def test_indices_and_seeds_are_unique():
    tasks = take(TaskCursor(ENVS, 7), 5000)
    assert [task.index for task in tasks] == list(range(5000))
    assert len({task.seed for task in tasks}) == 5000
    assert all(0 <= task.seed < 2**31 and task.split == "train" for task in tasks)


def test_weights_and_seed_shape_the_mixture():
    counts = Counter(task.env for task in take(TaskCursor(ENVS, 0), 4000))
    assert counts["guess"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert take(TaskCursor(ENVS, 0), 20) == take(TaskCursor(ENVS, 0), 20)
    assert take(TaskCursor(ENVS, 0), 20) != take(TaskCursor(ENVS, 1), 20)


def test_validation_is_the_same_for_every_run_and_spread_by_weight():
    tasks = validation_tasks(ENVS, 10)
    assert tasks == validation_tasks(ENVS, 10)
    assert Counter(task.env for task in tasks) == {"guess": 8, "sums": 2}  # 7.5 and 2.5: the tie goes to the first
    assert [task.index for task in tasks] == list(range(10))
    assert len({task.seed for task in tasks}) == 10 and {task.split for task in tasks} == {"validation"}


@given(n=st.integers(0, 100), weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_validation_counts_add_up(n, weights):
    envs = [(f"env{i}", weight) for i, weight in enumerate(weights)]
    counts = Counter(task.env for task in validation_tasks(envs, n))
    assert counts.total() == n
    for label, weight in envs:
        assert abs(counts[label] - n * weight / sum(weights)) < 1


def test_turn_seeds_repeat_and_differ():
    task = Task(0, "guess", 11)
    base = turn_seed(1, task, 2, 0, 3)
    assert base == turn_seed(1, task, 2, 0, 3) and 0 <= base < 2**31
    others = [
        turn_seed(2, task, 2, 0, 3),
        turn_seed(1, Task(0, "sums", 11), 2, 0, 3),
        turn_seed(1, Task(0, "guess", 12), 2, 0, 3),
        turn_seed(1, Task(0, "guess", 11, "validation"), 2, 0, 3),
        turn_seed(1, task, 1, 0, 3),
        turn_seed(1, task, 2, 1, 3),
        turn_seed(1, task, 2, 0, 4),
    ]
    assert len({base, *others}) == 8
    assert turn_seed(1, Task(5, "guess", 11), 2, 0, 3) == base  # where a task stands in the order does not matter
