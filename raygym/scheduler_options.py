"""What the Scheduler is told of a run: how many groups, how far ahead, and what may be tried again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from raygym.failure_budget import FailureBudget


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
    max_failures_in_a_row: int | None = None
    order: Literal["task", "completion"] = "task"
    over_sampling: float = 0.0
    extra_episodes: int = 0
    group_deadline_s: float | None = None
    dynamic_sampling: bool = False
    max_uniform_groups: int = 64

    def failure_budget(self) -> FailureBudget:
        """What may be tried again."""
        in_a_row = self.max_failures_in_a_row or max(256, 4 * self.max_concurrent)
        return FailureBudget(self.max_retries, self.retries, in_a_row)

    def admissible(self, version: int) -> int:
        """How many groups of the run may have begun while the engines serve `version`: those of step
        `version + max_staleness` and of all before it. In task order, their slots are the first so many."""
        return min(version + 1 + self.max_staleness, self.steps) * self.groups_per_step
