"""How often what may be tried again: retries by kind of failure, and when an environment is given up altogether."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from raygym.types import EpisodeFailure, Task, Trajectory


class RolloutStopped(RuntimeError):
    """Rollouts cannot go on: an environment fails always, or too many groups in a row were not usable."""


class FailureBudget:
    """Counts failed attempts of each environment."""

    def __init__(self, max_retries: int, by_kind: Mapping[str, int], max_in_a_row: int) -> None:
        """Allow `max_retries` fresh attempts at an episode.

        Args:
            max_retries: for kinds that are not in `by_kind`.
            by_kind: kind of failure to its own number of fresh attempts.
            max_in_a_row: failed attempts of one environment, none finished in between, before it is hopeless.
        """
        self._max_retries = max_retries
        self._by_kind = dict(by_kind)
        self._max_in_a_row = max_in_a_row
        self._in_a_row: Counter[str] = Counter()

    def finished(self, env: str) -> None:
        """An episode of `env` came to its end."""
        self._in_a_row[env] = 0

    def failed(self, env: str) -> None:
        """An attempt at an episode of `env` failed."""
        self._in_a_row[env] += 1

    def may_retry(self, kind: str, attempt: int) -> bool:
        """Whether attempt number `attempt` (from 0), which failed with `kind`, may be followed by another."""
        return attempt < self._by_kind.get(kind, self._max_retries)

    def check_hope(self, task: Task, kind: str, detail: str) -> None:
        """Whether the environment of `task`, an attempt at which has just failed, may be tried any more.

        Raises:
            RolloutStopped: too many of its attempts failed in a row.
        """
        count = self._in_a_row[task.env]
        if count > self._max_in_a_row:
            raise RolloutStopped(
                f"environment {task.env!r} failed {count} times in a row, no episode of it finished in between "
                f"(rollout.max_failures_in_a_row); the last, of task seed {task.seed}: {kind}: {detail}"
            )


def failure_of(outcome: Trajectory | EpisodeFailure) -> tuple[str, str]:
    """Kind and detail; empty for an episode that came to its end."""
    if isinstance(outcome, EpisodeFailure):
        return outcome.kind, outcome.detail
    return outcome.failure or "", outcome.failure_detail
