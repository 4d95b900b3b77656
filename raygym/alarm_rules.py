"""The rules of the alarms: each looks at one step's scalars after another, and says what is wrong or nothing.

A step that does not have a rule's scalars, or has them as no finite number, changes nothing. Nor does a step that
trained no token, where the scalar is of the update: it is 0 then, which is no measurement.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median, pstdev
from typing import Protocol

from raygym.alarm_config import AlarmsConfig

_STALE_TIMES = 3.0
"""On stale data the policy that learns is another one than that which sampled; so many times as usual is too far."""
_CHANCE = 3.0
"""Deviations of a step's mean reward that may be chance."""

Metrics = Mapping[str, float]


class Rule(Protocol):
    """One alarm's view of a run."""

    def look(self, metrics: Metrics) -> str:
        """What is wrong at this step, for a person; empty where nothing is."""


class EntropyCollapse:
    """The policy has nearly stopped to choose."""

    def __init__(self, config: AlarmsConfig) -> None:
        self._config = config
        self._start: list[float] = []
        self._streak = 0

    def look(self, metrics: Metrics) -> str:
        """Of `Rule`."""
        entropy = _of_update(metrics, "policy/entropy")
        if entropy is None:
            return ""
        if len(self._start) < self._config.patience:
            self._start.append(entropy)
            return ""
        start = fmean(self._start)
        self._streak = self._streak + 1 if entropy < self._config.entropy_share * start else 0
        if self._streak < self._config.patience:
            return ""
        return (
            f"policy/entropy {entropy:.3g} nats, {self._streak} steps in a row below "
            f"{self._config.entropy_share:g} of the {start:.3g} at the start"
        )


class LogprobDrift:
    """The learner gives sampled tokens other logprobs than the engine that sampled them."""

    def __init__(self, config: AlarmsConfig, limit: float) -> None:
        """`limit`: nats, what `logprob_limit` amounts to for the run's `dtype`."""
        self._config = config
        self._limit = limit
        self._before: deque[float] = deque(maxlen=config.window)
        self._streak = 0

    def look(self, metrics: Metrics) -> str:
        """Of `Rule`."""
        difference = _of_update(metrics, "policy/logprob_abs_diff")
        if difference is None:
            return ""
        stale = metrics.get("policy/staleness_max", 0.0) > 0
        usual = median(self._before) if len(self._before) == self._config.window else math.inf
        limit = max(self._limit, _STALE_TIMES * usual) if stale else self._limit
        if difference <= limit:
            self._streak = 0
            # What is too far is no part of what is usual, or it would be after a while.
            self._before.append(difference)
            return ""
        self._streak += 1
        if self._streak < self._config.patience:
            return ""
        against = f"{_STALE_TIMES:g} times the {usual:.3g} that were usual" if limit > self._limit else f"{limit:.3g}"
        return f"policy/logprob_abs_diff {difference:.3g} nats, {self._streak} steps in a row above {against}"


class GradientSpike:
    """One update's gradient is of another size than those before."""

    def __init__(self, config: AlarmsConfig) -> None:
        self._config = config
        self._before: deque[float] = deque(maxlen=config.window)

    def look(self, metrics: Metrics) -> str:
        """Of `Rule`."""
        norm = _of_update(metrics, "grad/norm")
        if norm is None:
            return ""
        before = [*self._before]
        if norm > 0:  # a step without signal says nothing about the size of others
            self._before.append(norm)
        if len(before) < self._config.window or norm <= self._config.gradient_times * median(before):
            return ""
        return f"grad/norm {norm:.3g}, {norm / median(before):.3g} times the median of {len(before)} steps before"


class RewardCollapse:
    """The policy has lost what it was able to do."""

    def __init__(self, config: AlarmsConfig) -> None:
        self._config = config
        self._window: deque[tuple[float, float]] = deque(maxlen=config.window)
        self._best = (-math.inf, 0.0, 0.0)
        """Of the best window: mean reward, its deviation over steps, the mean deviation among a step's episodes."""
        self._streak = 0

    def look(self, metrics: Metrics) -> str:
        """Of `Rule`."""
        reward, deviation = _finite(metrics, "reward/mean"), _finite(metrics, "reward/std")
        if reward is None or deviation is None:
            return ""
        best, over_steps, among_episodes = self._best
        # The present deviation counts, too: where all had the same reward, the one of the best steps is 0.
        drop = max(self._config.reward_drop * max(among_episodes, deviation), _CHANCE * over_steps)
        self._streak = self._streak + 1 if reward < best - drop else 0
        self._window.append((reward, deviation))
        if len(self._window) == self._config.window:
            rewards, deviations = zip(*self._window, strict=True)
            self._best = max(self._best, (fmean(rewards), pstdev(rewards), fmean(deviations)))
        if self._streak < self._config.patience:
            return ""
        return (
            f"reward/mean {reward:.3g}, {self._streak} steps in a row more than {drop:.3g} below the {best:.3g} of the "
            f"best {self._config.window} steps"
        )


def _of_update(metrics: Metrics, name: str) -> float | None:
    return None if metrics.get("tokens/trained") == 0 else _finite(metrics, name)


def _finite(metrics: Metrics, name: str) -> float | None:
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None
