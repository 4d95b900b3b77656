"""The order of tasks: seeded, resumable at any position, and the fixed set for validation.

Everything is a function of the position, so a cursor's whole state is one integer.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate

from raygym.types import Task

VALIDATION_SEED = 20_260_101
"""Independent of the run's seed, so that all runs validate on the same tasks."""
_SEEDS = 2**31


class TaskCursor:
    """Hands out the tasks of a run, one after the other, for ever."""

    def __init__(self, envs: Sequence[tuple[str, float]], seed: int, position: int = 0) -> None:
        """Stand at `position` of the order that `envs` (label, weight) and `seed` define."""
        _check(envs)
        self._labels = [label for label, _ in envs]
        self._bounds = list(accumulate(weight for _, weight in envs))
        self._seed = seed
        self._position = position

    @classmethod
    def from_state(cls, envs: Sequence[tuple[str, float]], seed: int, state: int) -> TaskCursor:
        """A cursor that goes on where the one with this `state()` stood."""
        return cls(envs, seed, state)

    def state(self) -> int:
        """How many tasks were handed out."""
        return self._position

    def next(self) -> Task:
        """The next task. Its environment is drawn by weight; its seed occurs once in 2^31 tasks."""
        self._position += 1
        return self.task(self._position - 1)

    def task(self, index: int) -> Task:
        """The task at a place of the order, from 0."""
        # Without the last bound, rounding at the upper end still lands on the last environment.
        point = _hash("env", self._seed, index) / _SEEDS * self._bounds[-1]
        label = self._labels[bisect(self._bounds[:-1], point)]
        return Task(index, label, _unique_seed("train", self._seed, index))


def validation_tasks(envs: Sequence[tuple[str, float]], n: int, seed: int = VALIDATION_SEED) -> list[Task]:
    """`n` tasks of the split `validation`, spread over the environments by weight: the same at every call.

    Shares are rounded by the largest remainder, ties to the earlier environment.
    """
    _check(envs)
    total = sum(weight for _, weight in envs)
    shares = [n * weight / total for _, weight in envs]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(envs)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    labels = [label for (label, _), count in zip(envs, counts, strict=True) for _ in range(count)]
    return [
        Task(index, label, _unique_seed("validation", seed, index), split="validation")
        for index, label in enumerate(labels)
    ]


def turn_seed(run_seed: int, task: Task, episode: int, attempt: int, turn: int) -> int:
    """The sampling seed of one turn, 31 bits: a run repeats exactly, and no two turns share their randomness.

    `attempt` counts from 0, whatever was lost before: it is no seed of its own how often a run was interrupted.
    """
    return _hash("turn", run_seed, task.env, task.split, task.seed, episode, attempt, turn)


def _unique_seed(purpose: str, seed: int, index: int) -> int:
    # Multiplying by an odd number and adding is a bijection of the 31-bit numbers: no two indices share a seed.
    factor = _hash(purpose, "factor", seed) | 1
    return (index * factor + _hash(purpose, "offset", seed)) % _SEEDS


def _hash(*parts: int | str) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _SEEDS


def _check(envs: Sequence[tuple[str, float]]) -> None:
    assert envs, "at least one environment"
    assert all(weight > 0 for _, weight in envs), envs
