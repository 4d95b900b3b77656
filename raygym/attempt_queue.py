"""Attempts at episodes that wait or run, and which is next: training and validation share the places."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from raygym.types import Task


@dataclass(frozen=True, slots=True)
class Assignment:
    """One attempt at one episode, ready to run."""

    group_id: str
    task: Task
    episode: int
    attempt: int


class AttemptQueue:
    """All in the order in which they came, each method in constant time but for `forget`, which is in the group's size.

    An attempt waits, then runs until `end`. Validation gets at most half of the places while training waits as well.
    """

    def __init__(self) -> None:
        """Nothing waits."""
        self._waiting: OrderedDict[Assignment, None] = OrderedDict()
        self._waiting_validation: OrderedDict[Assignment, None] = OrderedDict()
        self._running: dict[Assignment, None] = {}
        self._running_validation = 0
        self._validation_began_last = False
        # Of each group: its attempts that wait or run.
        self._of_group: dict[str, dict[Assignment, None]] = {}
        # In order, each once.
        self._obsolete: dict[Assignment, None] = {}

    @property
    def running(self) -> int:
        """Attempts in flight."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Training attempts that wait."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Assignment]:
        """What runs, in the order of its start."""
        return iter(self._running)

    def wait(self, assignment: Assignment, *, first: bool = False) -> None:
        """It waits for a place: behind all others, or before them."""
        waiting = self._waiting_validation if assignment.task.split == "validation" else self._waiting
        waiting[assignment] = None
        if first:
            waiting.move_to_end(assignment, last=False)
        self._of_group.setdefault(assignment.group_id, {})[assignment] = None

    def start(self, places: int) -> Assignment | None:
        """The next attempt, which runs from now on; None where none waits.

        Args:
            places: that there are in all, of which validation gets half. With one place they take turns.
        """
        half = places // 2
        allowed = self._running_validation < half if half else not self._validation_began_last
        self._validation_began_last = bool(self._waiting_validation and (allowed or not self._waiting))
        waiting = self._waiting_validation if self._validation_began_last else self._waiting
        if not waiting:
            return None
        self._running_validation += self._validation_began_last
        assignment = waiting.popitem(last=False)[0]
        self._running[assignment] = None
        return assignment

    def end(self, assignment: Assignment) -> None:
        """It runs no more. One that does not run is nobody's mistake: its group may have been forgotten."""
        if assignment in self._running:
            del self._running[assignment]
            self._running_validation -= assignment.task.split == "validation"

    def over(self, assignment: Assignment) -> None:
        """It belongs to its group's attempts no more."""
        self._of_group.get(assignment.group_id, {}).pop(assignment, None)

    def forget(self, group_id: str) -> None:
        """No further attempt at this group is wanted: what waits goes, what runs is obsolete."""
        for assignment in self._of_group.pop(group_id, ()):
            if assignment in self._running:
                self._obsolete[assignment] = None
            self._waiting.pop(assignment, None)
            self._waiting_validation.pop(assignment, None)

    def obsolete(self) -> list[Assignment]:
        """Running attempts that have become obsolete, each told once."""
        told, self._obsolete = self._obsolete, {}
        return [assignment for assignment in told if assignment in self._running]
