"""By how much two runs of the same benchmark may differ, and whether they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from harness.result import Metric, Result
from harness.units import is_ratio

from suite.goals import Goal

FEW_SAMPLES, FEW_FACTOR = 3, 2.5
"""With fewer samples than this a spread says little, so a goal's least noise counts so many times."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric in two runs."""

    goal: Goal
    before: Metric
    now: Metric
    noise: float

    @property
    def agrees(self) -> bool:
        """Whether what lies between them is noise."""
        return abs(self.now.median - self.before.median) <= self.noise

    @property
    def worse(self) -> bool:
        """Whether the later one is worse by more than noise."""
        better = (
            self.now.median > self.before.median if self.goal.up == "higher" else self.now.median < self.before.median
        )
        return self.goal.up is not None and not better and not self.agrees


def noise_of(goal: Goal, *metrics: Metric) -> float | None:
    """What medians of these runs may differ by; None where this is not asked of the metric.

    The largest spread (largest sample minus smallest) of any of the runs, but at least a part of the smallest median:
    `noise` in goals.yaml, or a tenth of a ratio. Where one of them has fewer than three samples, whose spread is small
    by chance or 0, that part is two and a half times as large: a single repetition on a shared machine was seen to be
    off by a quarter. Of the smallest, since a part above 1 of the larger one would let a ratio fall to nothing.
    """
    if goal.floor is None:
        return None
    factor = FEW_FACTOR if min(len(metric.samples) for metric in metrics) < FEW_SAMPLES else 1.0
    least = min(abs(metric.median) for metric in metrics)
    return max(goal.floor * factor * least, *(metric.spread for metric in metrics))


def differences(
    goals: Iterable[Goal], before: Mapping[str, Result], now: Mapping[str, Result], *, only_ratios: bool
) -> Iterator[Difference]:
    """What both runs have measured with the same config, and in the same way where a quick run has its own.

    Args:
        goals: the metrics to look at.
        before: results by benchmark.
        now: those to compare with them.
        only_ratios: leave out what is in seconds, bytes and the like, as another machine has others.
    """
    for goal, old, new in _asked_of_both(goals, before, now, only_ratios=only_ratios):
        first, second = old.metric(goal.metric), new.metric(goal.metric)
        if first is None or second is None or (noise := noise_of(goal, first, second)) is None:
            continue
        yield Difference(goal, first, second, noise)


def not_any_more(
    goals: Iterable[Goal], before: Mapping[str, Result], now: Mapping[str, Result], *, only_ratios: bool
) -> list[str]:
    """Metrics of the earlier run that the later one of the same benchmark has not."""
    asked = _asked_of_both(goals, before, now, only_ratios=only_ratios)
    return [goal.metric for goal, old, new in asked if old.metric(goal.metric) and not new.metric(goal.metric)]


def _asked_of_both(
    goals: Iterable[Goal], before: Mapping[str, Result], now: Mapping[str, Result], *, only_ratios: bool
) -> Iterator[tuple[Goal, Result, Result]]:
    for goal in goals:
        old, new = before.get(goal.benchmark), now.get(goal.benchmark)
        if old is None or new is None or old.config != new.config:
            continue
        otherwise = goal.quick_differs and old.quick != new.quick
        if not otherwise and (not only_ratios or is_ratio(goal.metric)):
            yield goal, old, new


def other_configs(before: Mapping[str, Result], now: Mapping[str, Result]) -> list[str]:
    """Benchmarks that both have run, each with another config, so that nothing can be said."""
    return sorted(name for name in before.keys() & now.keys() if before[name].config != now[name].config)
