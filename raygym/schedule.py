"""Which episode runs next: admission by staleness, bounded concurrency, retries, whole groups. Pure; no IO.

A group plays one task. In task order each place of a step's batch (a slot) belongs to one task; in completion order a
step takes the groups that are whole first. A group that cannot be completed, or is not wanted, is dropped with its
cause, and the next task of the order takes its place.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from raygym.attempt_queue import Assignment, AttemptQueue
from raygym.failure_budget import RolloutStopped, failure_of
from raygym.open_group import Dropped, Events, GroupState, OpenGroup, SchedulerState
from raygym.owed_groups import OwedGroups
from raygym.scheduler_options import SchedulerOptions
from raygym.supervision import PartEvent
from raygym.tasks import TaskCursor
from raygym.types import EpisodeFailure, Group, Task, Trajectory

__all__ = ["Assignment", "Collected", "Dropped", "RolloutStopped", "Scheduler", "SchedulerOptions", "SchedulerState"]


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
    part_events: tuple[PartEvent, ...] = ()
    """What became of EnvRunners since it was asked last."""


class Scheduler:
    """The rollout state of one run. Every method returns at once; the caller runs the assignments.

    After any call, `obsolete` has running attempts whose outcome no longer matters. With ten thousand episodes at once
    each of them ends in a call of `finish` and one of `start`, so neither may walk over all groups or episodes.
    """

    def __init__(
        self,
        cursor: TaskCursor,
        options: SchedulerOptions,
        clock: Callable[[], float] = lambda: 0.0,
        state: SchedulerState | None = None,
        whole: Iterable[Group] = (),
    ) -> None:
        """Nothing runs yet.

        Args:
            cursor: the order of tasks.
            options: see there.
            clock: seconds, for `group_deadline_s`.
            state: where an earlier scheduler of the run stood, as its `successor`; the cursor stands there. Groups
                that it owes are played again as the same groups, as soon as `options` admit them; attempts have higher
                numbers than any of its own.
            whole: groups that it owes and that need not be played again, in the order in which they became whole. Those
                that do not fit any more are left aside.
        """
        self._cursor = cursor
        self._options = options
        self._clock = clock
        self._budget = options.failure_budget()
        state = state or SchedulerState()
        assert cursor.state() == state.cursor, (cursor.state(), state.cursor)
        self._restarts = state.restarts
        self._version = state.version
        self._delivered = state.delivered
        self._slots_given = state.slots_given
        self._train: dict[str, OpenGroup] = {}
        # Group IDs, in the order in which they became whole.
        self._whole: dict[str, None] = {}
        # In task order, of each step: how many of its groups are whole.
        self._whole_of_step: Counter[int] = Counter()
        # Of each admission's version: how many training groups are not whole.
        self._unfinished: Counter[int] = Counter()
        # With a group deadline, training groups in the order of their start; those that are done fall out in front.
        self._by_start: deque[OpenGroup] = deque()
        self._validation: dict[str, OpenGroup] = {}
        self._attempts = AttemptQueue()
        self._validation_ends_s = math.inf
        self._events = {"train": Events(), "validation": Events()}
        # By split: what one of them completes says nothing of the other.
        self._replaced_in_a_row = {"train": state.replaced_in_a_row, "validation": 0}
        self._uniform_in_a_row = state.uniform_in_a_row
        self.max_concurrent = options.max_concurrent
        """Episodes at once; may be changed at any time."""
        self.ahead = 0
        """So many more are handed out, for whoever runs them to have the next one at hand."""
        self.first_attempt = state.restarts * (1 + max(options.max_retries, *options.retries.values(), 0))
        """Number of the first attempt at each episode; that of an earlier scheduler's last one is lower."""
        owed = OwedGroups.of(state, whole, cursor, options)
        self._later = owed.later
        self._restore(state, owed)

    @property
    def running(self) -> int:
        """Episodes in flight."""
        return self._attempts.running

    def describe(self) -> str:
        """What is going on, in one line for a person."""
        running = min(self.running, self.max_concurrent)
        parts = [f"{running} episodes running"]
        if self._validation:
            done = sum(group.whole() for group in self._validation.values())
            parts.insert(0, f"{done} of {len(self._validation)} validation tasks done")
        if self._train:
            parts.insert(0, f"{len(self._whole)} of {len(self._train)} groups whole")
        return ", ".join(parts)

    def state(self) -> SchedulerState:
        """What a scheduler that follows this one must know; small, at any moment."""
        events = self._events["train"]
        return SchedulerState(
            version=self._version,
            cursor=self._cursor.state(),
            delivered=self._delivered,
            slots_given=self._slots_given,
            groups=(*(GroupState(g.task.index, g.slot, g.admitted_at) for g in self._train.values()), *self._later),
            dropped=tuple((drop.task.index, drop.cause) for drop in events.dropped),
            failures=tuple((env, kind, count) for (env, kind), count in events.failures.items()),
            replaced_in_a_row=self._replaced_in_a_row["train"],
            uniform_in_a_row=self._uniform_in_a_row,
            restarts=self._restarts,
        )

    def whole_groups(self) -> tuple[Group, ...]:
        """What is whole and not collected yet, in the order in which it became so. `state` counts it as owed."""
        return tuple(self._train[group_id].close() for group_id in self._whole)

    def set_version(self, version: int) -> None:
        """The engines now serve `version`: groups of steps up to `version + max_staleness` may start."""
        assert version >= self._version, (version, self._version)
        self._version = version

    def add_validation(self, tasks: Iterable[Task], deadline_s: float = math.inf) -> None:
        """Queue each task once; they are played beside the training. What is not done after `deadline_s` is dropped.

        While training waits as well, validation is given at most half of the places.
        """
        assert not self._validation, "the previous validation was not collected"
        self._validation_ends_s = self._clock() + deadline_s
        for task in tasks:
            group = OpenGroup(f"validation-{self._version}-{task.index}", task, 1, self._version)
            self._validation[group.group_id] = group
        for group in self._validation.values():
            self._attempts.wait(self._first(group, 0))

    def start(self) -> list[Assignment]:
        """Episodes to start now; they count as running until `finish` is called with each."""
        self._admit()
        started = []
        while self.running < self.max_concurrent + self.ahead:
            if (assignment := self._attempts.start(self.max_concurrent)) is None:
                break
            group = self._open_group(assignment.group_id)
            assert group is not None
            if group.started_s is None:
                group.started_s = self._clock()
                if self._options.group_deadline_s is not None and group.group_id in self._train:
                    self._by_start.append(group)
            started.append(assignment)
        return started

    def finish(self, assignment: Assignment, outcome: Trajectory | EpisodeFailure) -> None:
        """Record one attempt's end.

        Raises:
            RolloutStopped: its environment is hopeless, or this was one replaced group too many.
        """
        self._attempts.end(assignment)
        group = self._open_group(assignment.group_id)
        if group is None or group.whole():
            return
        self._attempts.over(assignment)
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
            self._attempts.wait(retry, first=True)
        elif group.spare:
            group.spare -= 1
        else:
            self._give_up(group, f"{kind}: {detail}")

    def expire(self) -> None:
        """Replace groups that are older than `group_deadline_s`, and end a validation that is past its deadline.

        Raises:
            RolloutStopped: this was one replaced group too many.
        """
        while (group_s := self._next_group_expiry()) is not None and self._clock() >= group_s:
            group = self._by_start[0]
            done = f"{len(group.finished)} of {group.size} episodes were done"
            self._give_up(group, f"group_deadline: not whole after {self._options.group_deadline_s:g} s; {done}")
        if self._clock() >= self._validation_ends_s:
            self._end_validation()

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next, on the clock; None when nothing can expire."""
        group_s = self._next_group_expiry()
        first_s = self._validation_ends_s if group_s is None else min(group_s, self._validation_ends_s)
        return None if first_s == math.inf else first_s

    def obsolete(self) -> list[Assignment]:
        """Running attempts whose outcome no longer matters, each told once: cancel them."""
        return self._attempts.obsolete()

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
            del self._whole[group.group_id]
        self._whole_of_step.pop(step, None)
        self._unfinished = +self._unfinished
        if self._options.order == "completion":
            self._drop_stale(step)
        return self._collected(groups, "train")

    def collect_validation(self) -> Collected | None:
        """The validation's groups (one episode each), or None while one is missing."""
        groups = list(self._validation.values())
        if not all(group.whole() for group in groups):
            return None
        self._validation, self._validation_ends_s = {}, math.inf
        return self._collected(groups, "validation")

    def _end_validation(self) -> None:
        self._validation_ends_s = math.inf
        for group in [group for group in self._validation.values() if not group.whole()]:
            # Not counted against the run's patience: late is not hopeless.
            self._drop(group, "validation_deadline: not done in time (validation.deadline_s)")

    def _next_group_expiry(self) -> float | None:
        while self._by_start:
            oldest = self._by_start[0]
            if self._train.get(oldest.group_id) is oldest and not oldest.whole():
                assert oldest.started_s is not None and self._options.group_deadline_s is not None
                return oldest.started_s + self._options.group_deadline_s
            self._by_start.popleft()
        return None

    def _admit(self) -> None:
        options = self._options
        ahead = options.admissible(self._version)
        while self._later and self._later[0].slot < ahead:
            owed = self._later.popleft()
            self._open(self._cursor.task(owed.task), owed.slot, self._version)
        if options.order == "task":
            while self._slots_given < ahead:
                self._open(self._cursor.next(), self._slots_given, self._version)
                self._slots_given += 1
        elif self._delivered < options.steps * options.groups_per_step:
            extra = math.ceil(options.over_sampling * options.groups_per_step)
            # Only for places that are free now: a group that waited would be too stale before it had a token.
            free = self.max_concurrent + self.ahead - self.running - self._attempts.waiting
            while free > 0 and self._delivered + len(self._train) < ahead + extra:
                free -= self._open(self._cursor.next(), -1, self._version)

    def _restore(self, state: SchedulerState, owed: OwedGroups) -> None:
        events = self._events["train"]
        for index, cause in state.dropped:
            task = self._cursor.task(index)
            events.dropped.append(Dropped(task, f"{task.split}-{index}", cause))
        events.failures.update({(env, kind): count for env, kind, count in state.failures})
        for group in owed.now:
            self._open(self._cursor.task(group.task), group.slot, group.admitted_at)
        for kept in owed.whole:
            self._train[kept.group_id] = kept
            self._deliverable(kept)

    def _open(self, task: Task, slot: int, admitted_at: int, *, first: bool = False) -> int:
        """Returns how many episodes wait for a place now because of it."""
        size, spare = self._options.group_size, self._options.extra_episodes
        group = OpenGroup(f"{task.split}-{task.index}", task, size, admitted_at, slot, spare)
        self._train[group.group_id] = group
        self._unfinished[admitted_at] += 1
        episodes = [self._first(group, episode) for episode in range(size + spare)]
        for assignment in reversed(episodes) if first else episodes:
            self._attempts.wait(assignment, first=first)
        return len(episodes)

    def _first(self, group: OpenGroup, episode: int) -> Assignment:
        return Assignment(group.group_id, group.task, episode, self.first_attempt)

    def _complete(self, group: OpenGroup) -> None:
        self._replaced_in_a_row[group.task.split] = 0
        self._attempts.forget(group.group_id)
        if group.group_id in self._validation:
            return
        rewards = {trajectory.reward for trajectory in group.finished.values()}
        if not self._options.dynamic_sampling or len(rewards) > 1:
            self._uniform_in_a_row = 0
            self._unfinished[group.admitted_at] -= 1
            self._deliverable(group)
            return
        self._uniform_in_a_row += 1
        if self._uniform_in_a_row > self._options.max_uniform_groups:
            raise RolloutStopped(
                f"{self._uniform_in_a_row} groups in a row had no two different rewards (all {rewards.pop():g} in the "
                f"last, of environment {group.task.env!r}): there is nothing to learn from. Use easier or harder "
                "tasks, a higher temperature, or switch rollout.dynamic_sampling off"
            )
        self._replace(group, f"no_spread: all {self._options.group_size} rewards were {rewards.pop():g}")

    def _deliverable(self, group: OpenGroup) -> None:
        self._whole[group.group_id] = None
        if group.slot >= 0:
            self._whole_of_step[group.slot // self._options.groups_per_step] += 1

    def _give_up(self, group: OpenGroup, cause: str) -> None:
        self._replaced_in_a_row[group.task.split] += 1
        in_a_row = self._replaced_in_a_row[group.task.split]
        if in_a_row > self._options.max_replaced_groups:
            raise RolloutStopped(
                f"{in_a_row} groups in a row could not be completed; the last was of environment "
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
        self._attempts.forget(group.group_id)
        self._validation.pop(group.group_id, None)
        if self._train.pop(group.group_id, None) is None:
            return
        if group.group_id in self._whole:
            del self._whole[group.group_id]  # it has no slot: in task order, what is whole is delivered
        else:
            self._unfinished[group.admitted_at] -= 1

    def _by_slot(self, step: int) -> list[OpenGroup] | None:
        size = self._options.groups_per_step
        if self._whole_of_step[step] < size:
            return None
        return sorted((group for group in self._train.values() if group.slot // size == step), key=lambda g: g.slot)

    def _by_completion(self, step: int) -> list[OpenGroup] | None:
        size = self._options.groups_per_step
        if len(self._whole) < size:
            return None
        due = step - self._options.max_staleness  # a group of this version or an older one is too stale afterwards
        if not self._options.over_sampling and any(n for version, n in self._unfinished.items() if version <= due):
            return None
        # A stable sort: of the same urgency, the first that was whole.
        whole = [self._train[group_id] for group_id in self._whole]
        return sorted(whole, key=lambda group: group.admitted_at > due)[:size]

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
