"""Which episode runs next: admission by staleness, bounded concurrency, retries, whole groups. Pure; no clock, no IO.

A slot is one place in a step's batch. Its group plays one task; when the group cannot be completed, the task is dropped
with its cause and the slot takes the next task of the order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from raygym.tasks import TaskCursor
from raygym.types import EpisodeFailure, Group, Task, Trajectory


class RolloutStopped(RuntimeError):
    """Rollouts cannot go on: too many groups in a row could not be completed."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One attempt at one episode, ready to run."""

    group_id: str
    task: Task
    episode: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A task that was given up, and why."""

    task: Task
    group_id: str
    cause: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What one step (or one validation) gave."""

    groups: tuple[Group, ...]
    dropped: tuple[Dropped, ...]
    failures: dict[str, int]
    """Failed attempts by kind since the last collection, retried ones included."""
    failures_by_env: dict[str, int] = field(default_factory=dict)
    """The same by environment."""


@dataclass(slots=True)
class _OpenGroup:
    group_id: str
    task: Task
    size: int
    finished: dict[int, Trajectory] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.finished) == self.size

    def close(self) -> Group:
        return Group(self.group_id, self.task, tuple(self.finished[i] for i in range(self.size)))


class Scheduler:
    """The rollout state of one run. Every method returns at once; the caller runs the assignments."""

    def __init__(
        self,
        cursor: TaskCursor,
        *,
        groups_per_step: int,
        group_size: int,
        steps: int,
        max_concurrent: int,
        max_staleness: int,
        max_retries: int,
        max_replaced_groups: int,
    ) -> None:
        self._cursor = cursor
        self._groups_per_step = groups_per_step
        self._group_size = group_size
        self._slots = steps * groups_per_step
        self._max_concurrent = max_concurrent
        self._max_staleness = max_staleness
        self._max_retries = max_retries
        self._max_replaced_groups = max_replaced_groups
        self._version = 0
        self._admitted = 0
        self._by_slot: dict[int, _OpenGroup] = {}
        self._slot_of: dict[str, int] = {}
        self._validation: dict[str, _OpenGroup] = {}
        self._waiting: deque[Assignment] = deque()
        self._running: set[Assignment] = set()
        self._dropped: list[Dropped] = []
        self._failures: Counter[str] = Counter()
        self._failures_by_env: Counter[str] = Counter()
        self._replaced_in_a_row = 0

    @property
    def running(self) -> int:
        """Episodes in flight."""
        return len(self._running)

    def describe(self) -> str:
        """What is going on, in one line for a person."""
        whole = sum(group.whole for group in self._by_slot.values())
        if self._validation:
            done = sum(group.whole for group in self._validation.values())
            return f"{done} of {len(self._validation)} validation tasks done, {self.running} episodes running"
        return f"{whole} of {len(self._by_slot)} groups whole, {self.running} episodes running"

    def set_version(self, version: int) -> None:
        """The engines now serve `version`: groups of steps up to `version + max_staleness` may start."""
        assert version >= self._version, (version, self._version)
        self._version = version

    def add_validation(self, tasks: Iterable[Task]) -> None:
        """Queue each task once, before everything that waits."""
        assert not self._validation, "the previous validation was not collected"
        for task in tasks:
            group = _OpenGroup(f"validation-{self._version}-{task.index}", task, size=1)
            self._validation[group.group_id] = group
        self._waiting.extendleft(
            Assignment(group.group_id, group.task, 0, 0) for group in reversed(self._validation.values())
        )

    def start(self) -> list[Assignment]:
        """Episodes to start now; they count as running until `finish` is called with each."""
        self._admit()
        started = []
        while self._waiting and len(self._running) < self._max_concurrent:
            assignment = self._waiting.popleft()
            self._running.add(assignment)
            started.append(assignment)
        return started

    def finish(self, assignment: Assignment, outcome: Trajectory | EpisodeFailure) -> list[Assignment]:
        """Record one attempt's end.

        Returns:
            Running attempts of a group that was given up: their outcome no longer matters, cancel them.

        Raises:
            RolloutStopped: this was one replaced group too many.
        """
        self._running.discard(assignment)
        group = self._open_group(assignment.group_id)
        if group is None:
            return []
        if isinstance(outcome, Trajectory) and outcome.failure is None:
            group.finished[assignment.episode] = outcome
            if group.whole:
                self._replaced_in_a_row = 0
            return []
        kind, detail = _failure(outcome)
        self._failures[kind] += 1
        self._failures_by_env[assignment.task.env] += 1
        if assignment.attempt < self._max_retries:
            retry = Assignment(assignment.group_id, assignment.task, assignment.episode, assignment.attempt + 1)
            self._waiting.appendleft(retry)
            return []
        return self._give_up(group, f"{kind}: {detail}")

    def collect_step(self, step: int) -> Collected | None:
        """The whole groups of `step`, in task order, or None while one is missing."""
        slots = range(step * self._groups_per_step, (step + 1) * self._groups_per_step)
        if not all(slot in self._by_slot and self._by_slot[slot].whole for slot in slots):
            return None
        groups = [self._by_slot.pop(slot) for slot in slots]
        for group in groups:
            del self._slot_of[group.group_id]
        return self._collected(groups)

    def collect_validation(self) -> Collected | None:
        """The validation's groups (one episode each), or None while one is missing."""
        groups = list(self._validation.values())
        if not all(group.whole for group in groups):
            return None
        self._validation = {}
        return self._collected(groups)

    def _admit(self) -> None:
        newest_step = self._version + self._max_staleness
        while self._admitted < self._slots and self._admitted // self._groups_per_step <= newest_step:
            self._open_slot(self._admitted)
            self._admitted += 1

    def _open_slot(self, slot: int, *, first: bool = False) -> None:
        task = self._cursor.next()
        group = _OpenGroup(f"{task.split}-{task.index}", task, self._group_size)
        self._by_slot[slot] = group
        self._slot_of[group.group_id] = slot
        episodes = [Assignment(group.group_id, task, episode, 0) for episode in range(self._group_size)]
        if first:
            self._waiting.extendleft(reversed(episodes))
        else:
            self._waiting.extend(episodes)

    def _give_up(self, group: _OpenGroup, cause: str) -> list[Assignment]:
        self._dropped.append(Dropped(group.task, group.group_id, cause))
        self._waiting = deque(a for a in self._waiting if a.group_id != group.group_id)
        self._replaced_in_a_row += 1
        if self._replaced_in_a_row > self._max_replaced_groups:
            raise RolloutStopped(
                f"{self._replaced_in_a_row} groups in a row could not be completed; the last was of environment "
                f"{group.task.env!r} (task seed {group.task.seed}) and failed with {cause}"
            )
        if group.group_id in self._validation:
            del self._validation[group.group_id]
        else:
            # A replacement belongs to the oldest step that still waits, so it goes before everything younger.
            self._open_slot(self._slot_of.pop(group.group_id), first=True)
        return [a for a in self._running if a.group_id == group.group_id]

    def _open_group(self, group_id: str) -> _OpenGroup | None:
        if group_id in self._slot_of:
            return self._by_slot[self._slot_of[group_id]]
        return self._validation.get(group_id)

    def _collected(self, groups: list[_OpenGroup]) -> Collected:
        dropped, self._dropped = tuple(self._dropped), []
        failures, self._failures = dict(self._failures), Counter()
        by_env, self._failures_by_env = dict(self._failures_by_env), Counter()
        return Collected(tuple(group.close() for group in groups), dropped, failures, by_env)


def _failure(outcome: Trajectory | EpisodeFailure) -> tuple[str, str]:
    if isinstance(outcome, EpisodeFailure):
        return outcome.kind, outcome.detail
    assert outcome.failure is not None
    return outcome.failure, outcome.failure_detail
