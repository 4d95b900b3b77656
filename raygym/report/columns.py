"""The numbers of metrics.jsonl by name, as far as a report shows them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from raygym.report.odd_values import finite

Points = list[tuple[int, float]]
"""(step, value), in order."""
_MOST_STEPS = 2**53
"""A float is exact up to here."""


class Columns:
    """Numbers by name and step. Rows are read one at a time, and what is no finite number is left out."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Read all rows; one without a step says nothing."""
        self._points: dict[str, Points] = defaultdict(list)
        self.steps = 0
        """The last step that was made."""
        for row in rows:
            step = row.get("step")
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < _MOST_STEPS:
                continue
            self.steps = max(self.steps, step)
            for name, value in row.items():
                # Half of the rows' text is what other pages show.
                if name != "step" and (number := finite(value)) is not None:
                    self._points[name].append((step, number))

    def __getitem__(self, name: str) -> Points:
        """Of one name; nothing where no row has it."""
        return self._points.get(name, [])

    def names(self, prefix: str) -> list[str]:
        """Those that begin so, sorted."""
        return sorted(name for name in self._points if name.startswith(prefix))

    def summed(self, prefix: str) -> Points:
        """By step, the sum of all names that begin so; 0 in steps without one."""
        sums: dict[int, float] = {step: 0.0 for step, _ in self["time/step_s"]}
        for name in self.names(prefix):
            for step, value in self._points[name]:
                sums[step] = sums.get(step, 0.0) + value
        return sorted(sums.items())

    def ratio(self, above: str, below: str) -> Points:
        """By step, one by the other, where both are known and the second is not 0, or next to it."""
        by = dict(self[below])
        quotients = [(step, finite(value / by[step])) for step, value in self[above] if by.get(step)]
        return [(step, quotient) for step, quotient in quotients if quotient is not None]

    def total(self, name: str) -> float:
        """The sum over all steps."""
        return sum(value for _, value in self[name])

    def mean(self, name: str, share: slice = slice(None)) -> float | None:
        """The mean over a part of the steps that have it; None where there are none."""
        values = [value for _, value in self[name]][share]
        return sum(values) / len(values) if values else None
