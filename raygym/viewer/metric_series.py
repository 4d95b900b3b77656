"""metrics.jsonl as columns: each metric over the steps, thinned out where there are more steps than a chart shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from raygym.viewer.growing_lines import GrowingLines

_MOST_POINTS = 1000


class MetricSeries:
    """The numbers of one run. One thread refreshes them; any may read them."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet. `path`: of metrics.jsonl."""
        self._lines = GrowingLines(path)
        self._rows: list[dict[str, float]] = []
        self._names: dict[str, None] = {}
        self.revision = 0
        """Counts changes."""

    def refresh(self) -> None:
        """Read what was added since."""
        if self._lines.restarted():
            self._rows, self._names = [], {}
            self.revision += 1
        for _, line in self._lines.new():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                continue
            numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
            self._names |= dict.fromkeys(name for name in numbers if name != "step")
            self._rows.append(numbers)
            self.revision += 1

    @property
    def names(self) -> list[str]:
        """Of all metrics, sorted."""
        return sorted(list(self._names))

    @property
    def last_step(self) -> int | None:
        """The newest one that has a row."""
        rows = self._rows
        return int(rows[-1]["step"]) if rows else None

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        return next((row[name] for row in reversed(self._rows) if name in row), None)

    def columns(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Metrics over the steps.

        Returns:
            `steps`, and for each name in `series` as many values, None where a step has none. `bucket`: over how many
            steps each value is the mean; 1 unless there are more than a chart shows.
        """
        rows = list(self._rows)
        wanted = self.names if names is None else [name for name in names if name in self._names]
        bucket = max(1, math.ceil(len(rows) / _MOST_POINTS))
        parts = [rows[start : start + bucket] for start in range(0, len(rows), bucket)]
        return {
            "bucket": bucket,
            "steps": [int(part[-1]["step"]) for part in parts],
            "series": {name: [_mean(part, name) for part in parts] for name in wanted},
        }


def _mean(rows: Sequence[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
