"""How values are spread: counts in fixed buckets, small enough for a row of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values between K edges, which rise: the first is of those up to the first edge, the last of the rest.

    A value that is an edge belongs to the bucket below it, as TensorBoard has it.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    """K + 1."""
    low: float
    """The smallest value, and so on; all 0 where there is none."""
    high: float
    total: float
    squares: float
    """Sum of the squared values."""

    @classmethod
    def of(cls, values: Sequence[float], edges: Sequence[float]) -> Histogram:
        """Count `values`, all finite."""
        array = np.asarray(values, dtype=np.float64)
        counts = np.bincount(np.searchsorted(edges, array, side="left"), minlength=len(edges) + 1)
        low, high = (float(array.min()), float(array.max())) if len(array) else (0.0, 0.0)
        return cls(
            tuple(float(edge) for edge in edges),
            tuple(counts.tolist()),
            low,
            high,
            float(array.sum()),
            float(np.square(array).sum()),
        )

    def to_json(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Histogram:
        """The histogram that `to_json` gave, also after a way through JSON text."""
        return cls(**{**data, "edges": tuple(data["edges"]), "counts": tuple(data["counts"])})
