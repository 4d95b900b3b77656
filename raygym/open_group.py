"""What the Scheduler keeps of a group in play and of a split's troubles, and what of it outlives the scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from raygym.types import Group, Task, Trajectory


@dataclass(frozen=True, slots=True)
class Dropped:
    """A task that was given up, and why."""

    task: Task
    group_id: str
    cause: str


@dataclass(slots=True)
class OpenGroup:
    """One group that is not delivered yet."""

    group_id: str
    task: Task
    size: int
    admitted_at: int
    """Weight version: no token of it is older."""
    slot: int = -1
    """Its place in the order of steps; -1 in completion order and for validation."""
    spare: int = 0
    """Episodes beyond `size` that may be lost without the group being lost."""
    finished: dict[int, Trajectory] = field(default_factory=dict)
    started_s: float | None = None

    def whole(self) -> bool:
        """Whether all of its episodes are done."""
        return len(self.finished) == self.size

    def close(self) -> Group:
        """What is delivered."""
        return Group(self.group_id, self.task, tuple(self.finished[i] for i in sorted(self.finished)))


@dataclass(slots=True)
class Events:
    """Of one split, since its last collection."""

    dropped: list[Dropped] = field(default_factory=list)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Failed attempts by environment and kind."""

    def by_kind(self) -> dict[str, int]:
        """Failed attempts by kind."""
        return self._totals(1)

    def by_env(self) -> dict[str, int]:
        """Failed attempts by environment."""
        return self._totals(0)

    def _totals(self, part: int) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for key, count in self.failures.items():
            totals[key[part]] += count
        return dict(totals)


@dataclass(frozen=True, slots=True)
class GroupState:
    """A training group that is owed: its episodes are played again, since no trajectory is kept."""

    task: int
    """Index in the order of tasks."""
    slot: int
    admitted_at: int


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """Where a run's rollouts stand: what a new Scheduler needs so that no task is skipped and none comes twice.

    A validation is not part of it; it is asked for again. The default is the state before the first task.
    """

    version: int = 0
    cursor: int = 0
    """Tasks of the order that were handed out."""
    delivered: int = 0
    slots_given: int = 0
    groups: tuple[GroupState, ...] = ()
    dropped: tuple[tuple[int, str], ...] = ()
    """Task index and cause of what was dropped and not told yet."""
    failures: tuple[tuple[str, str, int], ...] = ()
    """Environment, kind and number of the failed attempts that were not told yet."""
    replaced_in_a_row: int = 0
    uniform_in_a_row: int = 0
    restarts: int = 0
    """How many schedulers had this state's run before."""

    def successor(self, version: int = 0) -> SchedulerState:
        """For the next scheduler, when the last one is gone and the engines serve at least `version`."""
        return replace(self, restarts=self.restarts + 1, version=max(version, self.version))

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and mappings only."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SchedulerState:
        """The state that `to_json` gave, also after a way through JSON text."""
        values = dict(data)
        values["groups"] = tuple(GroupState(**group) for group in data["groups"])
        values["dropped"] = tuple((task, cause) for task, cause in data["dropped"])
        values["failures"] = tuple((env, kind, count) for env, kind, count in data["failures"])
        return cls(**values)
