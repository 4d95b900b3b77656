"""Which episode runs next: admission by staleness, bounded concurrency, retries, whole groups. Pure; no IO.

A group plays one task. In task order each place of a step's batch (a slot) belongs to one task; in completion order a
step takes the groups that are whole first. A group that cannot be completed, or is not wanted, is dropped with its
cause, and the next task of the order takes its place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from raygym.failure_budget import FailureBudget, RolloutStopped, failure_of
from raygym.open_group import Dropped, Events, GroupState, OpenGroup, SchedulerState
from raygym.tasks import TaskCursor
from raygym.types import EpisodeFailure, Group, Task, Trajectory

__all__ = ["Assignment", "Collected", "Dropped", "RolloutStopped", "Scheduler", "SchedulerOptions", "SchedulerState"]


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """What `rollout` of the run config says about scheduling; see there."""

    groups_per_step: int
    group_size: int
    steps: int
    max_concurrent: int
    max_staleness: int = 0
    max_retries: int = 3
    retries: Mapping[str, int] = field(default_factory=dict)
    max_replaced_groups: int = 16
    max_failures_in_a_row: int = 256
    order: Literal["task", "completion"] = "task"
    over_sampling: float = 0.0
    extra_episodes: int = 0
    group_deadline_s: float | None = None
    dynamic_sampling: bool = False
    max_uniform_groups: int = 64


@dataclass(frozen=True, slots=True)
class Assignment:
    """One attempt at one episode, ready to run."""

    group_id: str
    task: Task
    episode: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Collected:
    """What one step (or one validation) gave."""

    groups: tuple[Group, ...]
    dropped: tuple[Dropped, ...]
    failures: dict[str, int]
    """Failed attempts by kind since the last collection, retried ones included."""
    failures_by_env: dict[str, int] = field(default_factory=dict)
    """The same by environment."""
    loop_lag_ms: tuple[float, float] = (0.0, 0.0)
    """Of the RolloutManager meanwhile: median and 99th percentile."""
    state: SchedulerState = field(default_factory=SchedulerState)
    """What is left to do after this."""
    concurrency: float = 0.0
    """Episodes that might run at once meanwhile: the mean over time."""
    manager_restarts: int = 0
    """RolloutManagers that were lost since the last collection."""


class Scheduler:
    """The rollout state of one run. Every method returns at once; the caller runs the assignments.

    After any call, `obsolete` has running attempts whose outcome no longer matters.
    """

    def __init__(
        self,
        cursor: TaskCursor,
        options: SchedulerOptions,
        clock: Callable[[], float] = lambda: 0.0,
        state: SchedulerState | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            cursor: the order of tasks.
            options: see there.
            clock: seconds, for `group_deadline_s`.
            state: where an earlier scheduler of the run stood, as its `successor`; the cursor stands there. Groups
                that it owes are played again as the same groups; attempts have higher numbers than any of its own.
        """
        self._cursor = cursor
        self._options = options
        self._clock = clock
        self._budget = FailureBudget(options.max_retries, options.retries, options.max_failures_in_a_row)
        state = state or SchedulerState()
        assert cursor.state() == state.cursor, (cursor.state(), state.cursor)
        self._restarts = state.restarts
        self._version = state.version
        self._delivered = state.delivered
        self._slots_given = state.slots_given
        self._train: dict[str, OpenGroup] = {}
        self._whole: list[str] = []
        self._validation: dict[str, OpenGroup] = {}
        self._waiting: deque[Assignment] = deque()
        self._waiting_validation: deque[Assignment] = deque()
        # In the order of their start.
        self._running: dict[Assignment, None] = {}
        self._running_validation = 0
        # In order, each once.
        self._obsolete: dict[Assignment, None] = {}
        self._events = {"train": Events(), "validation": Events()}
        self._replaced_in_a_row = state.replaced_in_a_row
        self._uniform_in_a_row = state.uniform_in_a_row
        self.max_concurrent = options.max_concurrent
        """Episodes at once; may be changed at any time."""
        self.ahead = 0
        """So many more are handed out, for whoever runs them to have the next one at hand."""
        self.first_attempt = state.restarts * (1 + max(options.max_retries, *options.retries.values(), 0))
        """Number of the first attempt at each episode; that of an earlier scheduler's last one is lower."""
        self._restore(state)

    @property
    def running(self) -> int:
        """Episodes in flight."""
        return len(self._running)

    def describe(self) -> str:
        """What is going on, in one line for a person."""
        running = min(self.running, self.max_concurrent)
        if self._validation:
            done = sum(group.whole() for group in self._validation.values())
            return f"{done} of {len(self._validation)} validation tasks done, {running} episodes running"
        return f"{len(self._whole)} of {len(self._train)} groups whole, {running} episodes running"

    def state(self) -> SchedulerState:
        """What a scheduler that follows this one must know; small, at any moment."""
        events = self._events["train"]
        return SchedulerState(
            version=self._version,
            cursor=self._cursor.state(),
            delivered=self._delivered,
            slots_given=self._slots_given,
            groups=tuple(GroupState(g.task.index, g.slot, g.admitted_at) for g in self._train.values()),
            dropped=tuple((drop.task.index, drop.cause) for drop in events.dropped),
            failures=tuple((env, kind, count) for (env, kind), count in events.failures.items()),
            replaced_in_a_row=self._replaced_in_a_row,
            uniform_in_a_row=self._uniform_in_a_row,
            restarts=self._restarts,
        )

    def set_version(self, version: int) -> None:
        """The engines now serve `version`: groups of steps up to `version + max_staleness` may start."""
        assert version >= self._version, (version, self._version)
        self._version = version

    def add_validation(self, tasks: Iterable[Task]) -> None:
        """Queue each task once. While training waits as well, validation has half of the places."""
        assert not self._validation, "the previous validation was not collected"
        for task in tasks:
            group = OpenGroup(f"validation-{self._version}-{task.index}", task, 1, self._version)
            self._validation[group.group_id] = group
        self._waiting_validation.extend(self._first(g, 0) for g in self._validation.values())

    def start(self) -> list[Assignment]:
        """Episodes to start now; they count as running until `finish` is called with each."""
        self._admit()
        started = []
        while len(self._running) < self.max_concurrent + self.ahead and (assignment := self._next()) is not None:
            self._running[assignment] = None
            group = self._open_group(assignment.group_id)
            assert group is not None
            if group.started_s is None:
                group.started_s = self._clock()
            started.append(assignment)
        return started

    def finish(self, assignment: Assignment, outcome: Trajectory | EpisodeFailure) -> None:
        """Record one attempt's end.

        Raises:
            RolloutStopped: its environment is hopeless, or this was one replaced group too many.
        """
        if assignment in self._running:
            del self._running[assignment]
            self._running_validation -= assignment.task.split == "validation"
        group = self._open_group(assignment.group_id)
        if group is None or group.whole():
            return
        env = assignment.task.env
        kind, detail = failure_of(outcome)
        if isinstance(outcome, Trajectory) and not kind:
            self._budget.finished(env)
            group.finished[assignment.episode] = outcome
            if group.whole():
                self._complete(group)
            return
        self._events[assignment.task.split].failures[env, kind] += 1
        self._budget.failed(env)
        self._budget.check_hope(assignment.task, kind, detail)
        if self._budget.may_retry(kind, assignment.attempt - self.first_attempt):
            retry = Assignment(assignment.group_id, assignment.task, assignment.episode, assignment.attempt + 1)
            (self._waiting_validation if group.group_id in self._validation else self._waiting).appendleft(retry)
        elif group.spare:
            group.spare -= 1
        else:
            self._give_up(group, f"{kind}: {detail}")

    def expire(self) -> None:
        """Replace groups that are older than `group_deadline_s`.

        Raises:
            RolloutStopped: this was one replaced group too many.
        """
        for group, expires_s in self._expiries():
            if self._clock() >= expires_s:
                done = f"{len(group.finished)} of {group.size} episodes were done"
                self._give_up(group, f"group_deadline: not whole after {self._options.group_deadline_s:g} s; {done}")

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next, on the clock; None when nothing can expire."""
        return min((expires_s for _, expires_s in self._expiries()), default=None)

    def obsolete(self) -> list[Assignment]:
        """Running attempts whose outcome no longer matters, each told once: cancel them."""
        told, self._obsolete = self._obsolete, {}
        return [assignment for assignment in told if assignment in self._running]

    def collect_step(self, step: int) -> Collected | None:
        """The whole groups of `step`, or None while one is missing; they are trained with the version of that number.

        In task order these are the groups of the step's slots. In completion order they are the first that are whole;
        groups that would be too stale for the next step come first, and are waited for unless there is over-sampling.
        """
        groups = self._by_slot(step) if self._options.order == "task" else self._by_completion(step)
        if groups is None:
            return None
        self._delivered += len(groups)
        for group in groups:
            del self._train[group.group_id]
            self._whole.remove(group.group_id)
        if self._options.order == "completion":
            self._drop_stale(step)
        return self._collected(groups, "train")

    def collect_validation(self) -> Collected | None:
        """The validation's groups (one episode each), or None while one is missing."""
        groups = list(self._validation.values())
        if not all(group.whole() for group in groups):
            return None
        self._validation = {}
        return self._collected(groups, "validation")

    def _expiries(self) -> list[tuple[OpenGroup, float]]:
        limit = self._options.group_deadline_s
        if limit is None:
            return []
        open_groups = [group for group in self._train.values() if not group.whole()]
        return [(group, group.started_s + limit) for group in open_groups if group.started_s is not None]

    def _next(self) -> Assignment | None:
        half = max(1, self.max_concurrent // 2)
        if self._waiting_validation and (not self._waiting or self._running_validation < half):
            self._running_validation += 1
            return self._waiting_validation.popleft()
        return self._waiting.popleft() if self._waiting else None

    def _admit(self) -> None:
        options = self._options
        total = options.steps * options.groups_per_step
        ahead = min((self._version + 1 + options.max_staleness) * options.groups_per_step, total)
        if options.order == "task":
            while self._slots_given < ahead:
                self._open(self._cursor.next(), self._slots_given, self._version)
                self._slots_given += 1
        elif self._delivered < total:
            extra = math.ceil(options.over_sampling * options.groups_per_step)
            while self._delivered + len(self._train) < ahead + extra:
                self._open(self._cursor.next(), -1, self._version)

    def _restore(self, state: SchedulerState) -> None:
        events = self._events["train"]
        for index, cause in state.dropped:
            task = self._cursor.task(index)
            events.dropped.append(Dropped(task, f"{task.split}-{index}", cause))
        events.failures.update({(env, kind): count for env, kind, count in state.failures})
        # The oldest step first: a group that replaced another was admitted later than its place tells.
        for group in sorted(state.groups, key=lambda group: group.slot):
            self._open(self._cursor.task(group.task), group.slot, group.admitted_at)

    def _open(self, task: Task, slot: int, admitted_at: int, *, first: bool = False) -> None:
        size, spare = self._options.group_size, self._options.extra_episodes
        group = OpenGroup(f"{task.split}-{task.index}", task, size, admitted_at, slot, spare)
        self._train[group.group_id] = group
        episodes = [self._first(group, episode) for episode in range(size + spare)]
        if first:
            self._waiting.extendleft(reversed(episodes))
        else:
            self._waiting.extend(episodes)

    def _first(self, group: OpenGroup, episode: int) -> Assignment:
        return Assignment(group.group_id, group.task, episode, self.first_attempt)

    def _complete(self, group: OpenGroup) -> None:
        self._replaced_in_a_row = 0
        self._forget(group)
        if group.group_id in self._validation:
            return
        rewards = {trajectory.reward for trajectory in group.finished.values()}
        if not self._options.dynamic_sampling or len(rewards) > 1:
            self._uniform_in_a_row = 0
            self._whole.append(group.group_id)
            return
        self._uniform_in_a_row += 1
        if self._uniform_in_a_row > self._options.max_uniform_groups:
            raise RolloutStopped(
                f"{self._uniform_in_a_row} groups in a row had no two different rewards (all {rewards.pop():g} in the "
                f"last, of environment {group.task.env!r}): there is nothing to learn from. Use easier or harder "
                "tasks, a higher temperature, or switch rollout.dynamic_sampling off"
            )
        self._replace(group, f"no_spread: all {self._options.group_size} rewards were {rewards.pop():g}")

    def _give_up(self, group: OpenGroup, cause: str) -> None:
        self._replaced_in_a_row += 1
        if self._replaced_in_a_row > self._options.max_replaced_groups:
            raise RolloutStopped(
                f"{self._replaced_in_a_row} groups in a row could not be completed; the last was of environment "
                f"{group.task.env!r} (task seed {group.task.seed}): {cause}"
            )
        self._replace(group, cause)

    def _replace(self, group: OpenGroup, cause: str) -> None:
        self._drop(group, cause)
        if group.task.split != "validation" and group.slot >= 0:
            # It belongs to the oldest step that still waits, so it goes before everything younger.
            self._open(self._cursor.next(), group.slot, self._version, first=True)

    def _drop(self, group: OpenGroup, cause: str) -> None:
        self._events[group.task.split].dropped.append(Dropped(group.task, group.group_id, cause))
        self._forget(group)
        self._validation.pop(group.group_id, None)
        self._train.pop(group.group_id, None)
        if group.group_id in self._whole:
            self._whole.remove(group.group_id)

    def _forget(self, group: OpenGroup) -> None:
        """No further attempt at this group is wanted."""
        self._waiting = deque(a for a in self._waiting if a.group_id != group.group_id)
        self._waiting_validation = deque(a for a in self._waiting_validation if a.group_id != group.group_id)
        self._obsolete |= dict.fromkeys(a for a in self._running if a.group_id == group.group_id)

    def _by_slot(self, step: int) -> list[OpenGroup] | None:
        size = self._options.groups_per_step
        by_slot = {group.slot: group for group in self._train.values() if group.slot // size == step}
        if len(by_slot) < size or any(group.group_id not in self._whole for group in by_slot.values()):
            return None
        return [by_slot[slot] for slot in sorted(by_slot)]

    def _by_completion(self, step: int) -> list[OpenGroup] | None:
        due = [group for group in self._train.values() if self._last_step(group) <= step]
        if not self._options.over_sampling and any(group.group_id not in self._whole for group in due):
            return None
        # A stable sort: of the same urgency, the first that was whole.
        urgent = {group.group_id for group in due}
        size = self._options.groups_per_step
        chosen = sorted(self._whole, key=lambda group_id: group_id not in urgent)[:size]
        return [self._train[group_id] for group_id in chosen] if len(chosen) == size else None

    def _last_step(self, group: OpenGroup) -> int:
        return group.admitted_at + self._options.max_staleness

    def _drop_stale(self, step: int) -> None:
        last = step + 1 == self._options.steps
        for group in list(self._train.values()):
            if last or self._last_step(group) <= step:
                self._drop(group, "surplus: other groups were whole first (rollout.over_sampling)")

    def _open_group(self, group_id: str) -> OpenGroup | None:
        return self._train.get(group_id) or self._validation.get(group_id)

    def _collected(self, groups: list[OpenGroup], split: str) -> Collected:
        events, self._events[split] = self._events[split], Events()
        whole = tuple(group.close() for group in groups)
        return Collected(whole, tuple(events.dropped), events.by_kind(), events.by_env(), state=self.state())
