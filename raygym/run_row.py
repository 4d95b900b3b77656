"""What is known of one step, as it is in metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from raygym.histogram import Histogram

Value = float | str | Histogram | None
"""None: a number that is not finite, after a way through JSON."""
Row = Mapping[str, Value]
"""By the names that people see."""


def json_row(row: Row) -> dict[str, Any]:
    """The row as JSON has it: numbers that are not finite are null."""
    return {name: _as_json(value) for name, value in row.items()}


def parsed_row(row: Mapping[str, Any]) -> dict[str, Value]:
    """The row that `json_row` gave."""
    return {name: Histogram.from_json(value) if isinstance(value, dict) else value for name, value in row.items()}


def scalars(row: Row) -> dict[str, float]:
    """The row's numbers."""
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}


def _as_json(value: Value) -> Any:
    if isinstance(value, Histogram):
        return value.to_json()
    # JSON has no NaN and no infinity; most readers refuse what Python would write for them.
    return None if isinstance(value, float) and not math.isfinite(value) else value
