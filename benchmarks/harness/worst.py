"""Of several figures of the same thing, the one that a claim must hold for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median


def worst(samples: Mapping[str, list[float]], names: Iterable[str]) -> list[float]:
    """The samples of the metric with the smallest median, all of them, so that their spread is told as well.

    By the median, since single repetitions differ by a quarter on a shared machine.

    Args:
        samples: by metric.
        names: of those to choose from, of which there must be one; what was not measured is passed over.
    """
    return min((samples[name] for name in names if name in samples), key=median)
