"""How often what may be tried again: retries by kind of failure, and when an environment is given up altogether."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


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

    def hopeless(self, env: str) -> int:
        """How many attempts of `env` failed in a row, when that is too many; else 0."""
        count = self._in_a_row[env]
        return count if count > self._max_in_a_row else 0
