"""A run's numbers as Ray's own metrics, for its dashboard and Prometheus."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from raygym.run_row import Row
from raygym.tracking.prometheus import BOUNDARIES, FAMILIES, Family, Readings


class RayMetrics:
    """Sets them in the driver, once a step; each of them is labelled with the run's name."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._readings = Readings()
        self._metrics: dict[Family, Any] = {}

    def log(self, step: int, row: Row) -> None:
        """Set what the row says. A row that is written when Ray is gone already is not for Ray."""
        if not ray.is_initialized():
            return
        if not self._metrics:
            self._metrics = {family: _metric(family) for family in FAMILIES}
        for reading in self._readings.of(step, row):
            metric, family = self._metrics[reading.family], reading.family
            tags = {"run": self._run} | ({family.label: reading.label} if family.label else {})
            if family.kind == "gauge":
                metric.set(reading.value, tags)
            elif family.kind == "histogram":
                metric.observe(reading.value, tags)
            elif reading.value > 0:  # Ray refuses to count nothing
                metric.inc(reading.value, tags)


def _metric(family: Family) -> Any:
    keys = ("run", *([family.label] if family.label else []))
    if family.kind == "histogram":
        return Histogram(family.name, family.help, boundaries=list(BOUNDARIES), tag_keys=keys)
    return (Gauge if family.kind == "gauge" else Counter)(family.name, family.help, tag_keys=keys)
