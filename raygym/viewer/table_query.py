"""Which rows of the table are asked for: filters, an order, a page, and what all of them amount to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from raygym.viewer.trajectory_row import TrajectoryRow

_TEXTS = ("kind", "env", "status", "failure", "group_id", "file")
_RANGES = ("reward", "turns", "tokens", "generated", "step")
SORTABLE = (
    "step", "env", "group_id", "episode", "status", "reward", "turns", "tokens", "generated", "version_min",
    "generate_s", "env_s", "failure",
)  # fmt: skip
"""Columns that rows can be ordered by."""
_BINS = 24
_MOST_ROWS = 1000


class QueryError(ValueError):
    """What was asked for makes no sense. The text is for a person."""


@dataclass(frozen=True, slots=True)
class TableQuery:
    """One question to the table."""

    keep: tuple[Callable[[TrajectoryRow], bool], ...]
    sort: str | None
    descending: bool
    offset: int
    limit: int

    @classmethod
    def parse(cls, asked: Mapping[str, str]) -> TableQuery:
        """From a URL's parameters: `env=...`, `reward_min=...`, `version=...`, `drifted=1`, `sort=-reward`, `offset`,
        `limit`.

        Raises:
            QueryError: an unknown name, or a value that is no number.
        """
        keep: list[Callable[[TrajectoryRow], bool]] = []
        sort = asked.get("sort", "")
        for name, value in asked.items():
            if name in ("sort", "offset", "limit") or value == "":
                continue
            keep.append(_filter(name, value))
        column = sort.removeprefix("-")
        if column and column not in SORTABLE:
            raise QueryError(f"sort={sort}: expected one of {', '.join(SORTABLE)}, with - for the largest first")
        offset, limit = (int(_number(name, asked.get(name, default))) for name, default in _PAGE)
        return cls(tuple(keep), column or None, sort.startswith("-"), max(0, offset), min(max(1, limit), _MOST_ROWS))

    def answer(self, rows: Sequence[TrajectoryRow]) -> dict[str, Any]:
        """The page, with what there is to choose from and how the rewards of all kept rows are spread.

        `total` and `of` count rows, kept and all; `trajectories` and `of_trajectories` those that are no dropped task.
        """
        kept = [row for row in rows if all(keeps(row) for keeps in self.keep)] if self.keep else list(rows)
        if (column := self.sort) is not None:
            known = [row for row in kept if getattr(row, column) is not None]
            unknown = [row for row in kept if getattr(row, column) is None]
            kept = sorted(known, key=lambda row: getattr(row, column), reverse=self.descending) + unknown
        rewards = [row.reward for row in kept if row.reward is not None]
        return {
            "total": len(kept),
            "of": len(rows),
            "trajectories": sum(row.offset >= 0 for row in kept),
            "of_trajectories": sum(row.offset >= 0 for row in rows),
            "offset": self.offset,
            "rows": [row.shown() for row in kept[self.offset : self.offset + self.limit]],
            # Divided first: the sum of numbers that are floats may be none.
            "reward_mean": fsum(reward / len(rewards) for reward in rewards) if rewards else None,
            "rewards": _histogram(rewards),
            "choices": _choices(rows),
        }


_PAGE = (("offset", "0"), ("limit", "100"))


def _filter(name: str, value: str) -> Callable[[TrajectoryRow], bool]:
    if name in _TEXTS:
        return lambda row: getattr(row, name) == value
    if name == "drifted":
        return lambda row: row.drifted == (value not in ("0", "false"))
    if name == "version":
        version = _number(name, value)
        return lambda row: row.version_min is not None and row.version_min <= version <= (row.version_max or 0)
    column, _, end = name.rpartition("_")
    if column not in _RANGES or end not in ("min", "max"):
        raise QueryError(f"{name}: nothing is filtered by that name")
    bound = _number(name, value)
    if end == "min":
        return lambda row: (found := getattr(row, column)) is not None and found >= bound
    return lambda row: (found := getattr(row, column)) is not None and found <= bound


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise QueryError(f"{name}={value}: expected a number")
    return number


def _choices(rows: Iterable[TrajectoryRow]) -> dict[str, list[dict[str, Any]]]:
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("kind", "env", "status", "failure")}
    for row in rows:
        counts["kind"][row.kind] += 1
        counts["env"][row.env] += 1
        counts["status"][row.status] += 1
        if row.failure is not None:
            counts["failure"][row.failure] += 1
    return {
        name: [{"value": value, "count": count} for value, count in sorted(found.items())]
        for name, found in counts.items()
    }


def _histogram(rewards: Sequence[float]) -> dict[str, Any] | None:
    """Equal bins from the least to the largest; the last one has the largest in it."""
    if not rewards:
        return None
    low, high = min(rewards), max(rewards)
    counts = [0] * (_BINS if high > low else 1)
    # Of halves: what is between the largest floats is none.
    begin, width = low / 2, high / 2 - low / 2
    for reward in rewards:
        counts[min(int((reward / 2 - begin) / width * _BINS), _BINS - 1) if width > 0 else 0] += 1
    return {"low": low, "high": high, "counts": counts}
