"""metrics.jsonl as columns: each metric over the steps, thinned out where there are more steps than a chart shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygym.run_reading import is_number
from raygym.viewer.growing_lines import GrowingLines

_MOST_POINTS = 1000
_FAILED, _TRAINED = "episodes/failed/", "episodes/completed"
"""A row of a trained step names only the kinds of failures that there were."""


@dataclass(slots=True)
class _Exact:
    """What single numbers of a page are made of: of all steps, whatever the charts show of them."""

    first: float
    last: float
    sum: float = 0.0
    count: int = 0


class MetricSeries:
    """The numbers of one run. One thread refreshes them; any may read them."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet. `path`: of metrics.jsonl."""
        self._lines = GrowingLines(path, path.parent)
        self._rows: list[dict[str, float]] = []
        self._exact: dict[str, _Exact] = {}
        self.revision = 0
        """Counts changes."""
        self.unreadable = 0
        """Lines that are no row."""

    def refresh(self) -> None:
        """Read what was added since."""
        if self._lines.restarted():
            self._rows, self._exact, self.unreadable = [], {}, 0
            self.revision += 1
        for _, line in self._lines.new():
            if (row := _row(line)) is None:
                self.unreadable += 1
                continue
            for name, value in row.items():
                if name != "step":
                    exact = self._exact.setdefault(name, _Exact(value, value))
                    exact.last, exact.sum, exact.count = value, exact.sum + value, exact.count + 1
            self._rows.append(row)
            self.revision += 1

    @property
    def problem(self) -> str:
        """Why the file could not be read, when that was tried last."""
        return self._lines.problem

    @property
    def names(self) -> list[str]:
        """Of all metrics, sorted."""
        return sorted(list(self._exact))

    @property
    def last_step(self) -> int | None:
        """The newest one that has a row."""
        rows = self._rows
        return int(rows[-1]["step"]) if rows else None

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        exact = self._exact.get(name)
        return None if exact is None else exact.last

    def columns(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Metrics over the steps.

        Returns:
            `steps`, and for each name in `series` as many values, None where a step has none. `bucket`: over how many
            steps each value is the mean; 1 unless there are more than a chart shows. A trained step without a kind of
            failure counts as 0 of that. `exact`: by name `first`, `last`, `sum` and `count` of all steps' values.
        """
        rows, exact = list(self._rows), self._exact
        wanted = sorted(list(exact)) if names is None else [name for name in names if name in exact]
        bucket = max(1, math.ceil(len(rows) / _MOST_POINTS))
        parts = [rows[start : start + bucket] for start in range(0, len(rows), bucket)]
        return {
            "bucket": bucket,
            "steps": [int(part[-1]["step"]) for part in parts],
            "series": {name: [_mean(part, name) for part in parts] for name in wanted},
            "exact": {name: _shown(exact[name]) for name in wanted},
        }


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    numbers = {name: float(value) for name, value in row.items() if is_number(value)}
    return numbers if "step" in numbers else None


def _mean(rows: Sequence[dict[str, float]], name: str) -> float | None:
    if name.startswith(_FAILED):
        values = [row.get(name, 0.0) for row in rows if name in row or _TRAINED in row]
    else:
        values = [row[name] for row in rows if name in row]
    # Divided first: the sum of numbers that are floats may be none.
    return values[0] if len(values) == 1 else math.fsum(value / len(values) for value in values) if values else None


def _shown(exact: _Exact) -> dict[str, Any]:
    total = exact.sum if is_number(exact.sum) else None
    return {"first": exact.first, "last": exact.last, "sum": total, "count": exact.count}
