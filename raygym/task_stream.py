"""Tasks played without training: each once, in whole groups that are taken as they come. Pure; no IO.

It stands beside the Scheduler, which orders what is trained. Nothing here knows of steps, slots or weight versions.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from raygym.failure_budget import RolloutStopped, failure_of
from raygym.schedule import Assignment, Dropped, SchedulerOptions
from raygym.types import EpisodeFailure, Group, Task, Trajectory


@dataclass(frozen=True, slots=True)
class Taken:
    """What came to its end since the stream was last asked, and how far it is."""

    groups: tuple[Group, ...]
    dropped: tuple[Dropped, ...]
    failures: dict[tuple[str, str], int]
    """Failed attempts by (environment, kind), retried ones included."""
    running: int
    """Episodes in flight."""
    episodes: int
    """Finished in all, those of groups that are not whole yet included; so are the turns and tokens."""
    turns: int
    tokens: int
    done: bool
    """Nothing is left: neither to play nor to take."""


@dataclass(slots=True)
class _OpenGroup:
    task: Task
    finished: dict[int, Trajectory] = field(default_factory=dict)


class TaskStream:
    """Plays each task `samples` times. Every method returns at once; the caller runs the assignments.

    A failed attempt is tried again as the options say; a task of which an episode cannot be finished is dropped with
    its cause. No new task begins while `most_waiting` groups or more wait to be taken.
    """

    def __init__(self, tasks: Iterable[Task], samples: int, options: SchedulerOptions, most_waiting: int) -> None:
        """Nothing is started yet.

        Args:
            tasks: each is played; those of one split have different indices.
            samples: episodes of a task, at least 1.
            options: of these, the budgets for failures.
            most_waiting: whole groups, at least 1.
        """
        assert samples >= 1, samples
        assert most_waiting >= 1, most_waiting
        self._tasks = deque(tasks)
        self._samples = samples
        self._most_waiting = most_waiting
        self._budget = options.failure_budget()
        self._max_dropped_in_a_row = options.max_replaced_groups
        self._dropped_in_a_row = 0
        self._open: dict[str, _OpenGroup] = {}
        self._waiting: deque[Assignment] = deque()
        # In the order of their start.
        self._running: dict[Assignment, None] = {}
        self._obsolete: list[Assignment] = []
        self._whole: deque[Group] = deque()
        self._dropped: list[Dropped] = []
        self._failures: Counter[tuple[str, str]] = Counter()
        self._episodes = self._turns = self._tokens = 0

    def __contains__(self, assignment: Assignment) -> bool:
        """Whether it was started here and has not finished."""
        return assignment in self._running

    @property
    def running(self) -> int:
        """Episodes in flight."""
        return len(self._running)

    def start(self, places: int) -> list[Assignment]:
        """At most `places` episodes to start now; they count as running until `finish` is called with each."""
        started: list[Assignment] = []
        while len(started) < places:
            if not self._waiting:
                if not self._tasks or len(self._whole) >= self._most_waiting:
                    break
                self._begin(self._tasks.popleft())
            assignment = self._waiting.popleft()
            self._running[assignment] = None
            started.append(assignment)
        return started

    def finish(self, assignment: Assignment, outcome: Trajectory | EpisodeFailure) -> None:
        """Record one attempt's end.

        Raises:
            RolloutStopped: its environment is hopeless, or this was one dropped task too many.
        """
        del self._running[assignment]
        group = self._open.get(assignment.group_id)
        if group is None:
            return  # it was dropped meanwhile
        if isinstance(outcome, Trajectory) and outcome.failure is None:
            self._finished(assignment, outcome, group)
            return
        env, (kind, detail) = assignment.task.env, failure_of(outcome)
        self._failures[env, kind] += 1
        self._budget.failed(env)
        if self._budget.may_retry(kind, assignment.attempt):
            retry = Assignment(assignment.group_id, assignment.task, assignment.episode, assignment.attempt + 1)
            self._waiting.appendleft(retry)
        else:
            self._drop(assignment.group_id, f"{kind}: {detail}")
        self._budget.check_hope(assignment.task, kind, detail)
        if self._dropped_in_a_row > self._max_dropped_in_a_row:
            raise RolloutStopped(
                f"{self._dropped_in_a_row} tasks in a row could not be completed (rollout.max_replaced_groups); the "
                f"last was of environment {env!r} (task seed {assignment.task.seed}): {kind}: {detail}"
            )

    def obsolete(self) -> list[Assignment]:
        """Running attempts whose outcome no longer matters, each told once: cancel them."""
        told, self._obsolete = self._obsolete, []
        return [assignment for assignment in told if assignment in self._running]

    def take(self, most: int) -> Taken:
        """At most `most` whole groups, in the order in which they became whole, and what else happened meanwhile."""
        groups = tuple(self._whole.popleft() for _ in range(min(most, len(self._whole))))
        dropped, self._dropped = tuple(self._dropped), []
        failures, self._failures = dict(self._failures), Counter()
        return Taken(
            groups,
            dropped,
            failures,
            self.running,
            self._episodes,
            self._turns,
            self._tokens,
            done=not (self._tasks or self._open or self._whole),
        )

    def has_news(self) -> bool:
        """Whether `take` has a group or a dropped task to tell, or the end."""
        return bool(self._whole or self._dropped or not (self._tasks or self._open))

    def _begin(self, task: Task) -> None:
        group_id = f"{task.split}-{task.index}"
        assert group_id not in self._open, f"task {task.index} of split {task.split} was given twice"
        self._open[group_id] = _OpenGroup(task)
        self._waiting.extend(Assignment(group_id, task, episode, 0) for episode in range(self._samples))

    def _finished(self, assignment: Assignment, trajectory: Trajectory, group: _OpenGroup) -> None:
        self._budget.finished(assignment.task.env)
        self._episodes += 1
        self._turns += len(trajectory.turns)
        self._tokens += int(trajectory.loss_mask.sum())
        group.finished[assignment.episode] = trajectory
        if len(group.finished) == self._samples:
            self._dropped_in_a_row = 0
            del self._open[assignment.group_id]
            trajectories = tuple(group.finished[episode] for episode in range(self._samples))
            self._whole.append(Group(assignment.group_id, group.task, trajectories))

    def _drop(self, group_id: str, cause: str) -> None:
        group = self._open.pop(group_id)
        self._dropped_in_a_row += 1
        self._dropped.append(Dropped(group.task, group_id, cause))
        self._waiting = deque(a for a in self._waiting if a.group_id != group_id)
        self._obsolete.extend(a for a in self._running if a.group_id == group_id)
        # They are not among what is taken.
        self._episodes -= len(group.finished)
        self._turns -= sum(len(t.turns) for t in group.finished.values())
        self._tokens -= sum(int(t.loss_mask.sum()) for t in group.finished.values())
