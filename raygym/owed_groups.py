"""What a Scheduler does with the groups that one before it owes: keep, play now, or play later. Pure; no IO."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from raygym.open_group import GroupState, OpenGroup, SchedulerState
from raygym.scheduler_options import SchedulerOptions
from raygym.tasks import TaskCursor
from raygym.types import Group, Task


@dataclass(frozen=True, slots=True)
class OwedGroups:
    """All groups of a state, each in one of the three."""

    whole: tuple[OpenGroup, ...]
    """Need not be played again; in the order in which they became whole."""
    now: tuple[GroupState, ...]
    """May begin with the version that is served; in the order of their slots."""
    later: deque[GroupState]
    """Of steps that are too far ahead of it: steps may be smaller now, or less stale. In the order of their slots."""

    @classmethod
    def of(
        cls, state: SchedulerState, whole: Iterable[Group], cursor: TaskCursor, options: SchedulerOptions
    ) -> OwedGroups:
        """Sort what `state` owes.

        Args:
            state: of the scheduler before.
            whole: groups that were whole there. Those that it does not owe, or that are too stale or of other options
                by now, are left aside.
            cursor: the order of tasks.
            options: of the scheduler that goes on.
        """
        by_task = {group.task.index: group for group in whole}
        kept: dict[int, OpenGroup] = {}
        now: list[GroupState] = []
        later: deque[GroupState] = deque()
        # The oldest step first: a group that replaced another was admitted later than its place tells.
        for owed in sorted(state.groups, key=lambda group: group.slot):
            task, found = cursor.task(owed.task), by_task.get(owed.task)
            if found is not None and _still_good(found, task, owed, state.version, options):
                finished = {t.episode: t for t in found.trajectories}
                kept[owed.task] = OpenGroup(
                    found.group_id, task, options.group_size, owed.admitted_at, owed.slot, finished=finished
                )
            elif owed.slot < options.admissible(state.version):
                now.append(owed)
            else:
                later.append(owed)
        return cls(tuple(kept[index] for index in by_task if index in kept), tuple(now), later)


def _still_good(whole: Group, task: Task, owed: GroupState, version: int, options: SchedulerOptions) -> bool:
    # Not so after a change of the config: other tasks, other sizes of groups, less staleness.
    trained_at = owed.slot // options.groups_per_step if owed.slot >= 0 else version
    fresh = trained_at - owed.admitted_at <= options.max_staleness
    return fresh and whole.task == task and len(whole.trajectories) == options.group_size
