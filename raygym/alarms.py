"""Alarms: which rules hold after each step of a run, and which have begun to. Pure; no IO.

Its state follows from the rows of metrics.jsonl, so whoever goes on with a run shows it those of the steps before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from raygym.alarm_config import AlarmAction
from raygym.alarm_rules import EntropyCollapse, GradientSpike, LogprobDrift, RewardCollapse, Rule
from raygym.config import RunConfig

NOT_FINITE = "not_finite"
_MUST_BE_FINITE = ("advantage/abs_mean", "loss", "grad/norm")
_LOGPROB_LIMITS = {"float32": 0.01, "bfloat16": 0.1}


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something is wrong with a run, and was not before."""

    name: str
    action: Literal["warn", "stop"]
    reason: str
    """One line: what was seen, and against what."""


class AlarmStop(RuntimeError):
    """An alarm ends the run. The text is one line: which, at what step, why, and where the step's trajectories are."""


class Alarms:
    """The alarms of one run."""

    def __init__(self, config: RunConfig) -> None:
        """No step was seen yet."""
        options = config.alarms
        limit = options.logprob_limit or _LOGPROB_LIMITS[config.learner.dtype]
        rules: dict[str, tuple[AlarmAction, Rule]] = {
            "entropy_collapse": (options.entropy_collapse, EntropyCollapse(options)),
            "logprob_drift": (options.logprob_drift, LogprobDrift(options, limit)),
            "gradient_spike": (options.gradient_spike, GradientSpike(options)),
            "reward_collapse": (options.reward_collapse, RewardCollapse(options)),
        }
        self._rules = {name: (action, rule) for name, (action, rule) in rules.items() if action != "off"}
        self.holding: dict[str, str] = {}
        """Those that hold after the last step, new ones or not, and why."""

    def observe(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Look at the scalars of the next step. Returns the alarms that did not hold after the step before."""
        reasons = {name: rule.look(metrics) for name, (_, rule) in self._rules.items()}
        before, self.holding = self.holding, {name: reason for name, reason in reasons.items() if reason}
        return [
            Alarm(name, self._rules[name][0], reason) for name, reason in self.holding.items() if name not in before
        ]

    def replay(self, rows: Iterable[Mapping[str, float]]) -> list[Alarm]:
        """Take the rows of steps that are over, oldest first, as seen. Their alarms were told then.

        Returns:
            Those that hold after the last of them and stop a run.
        """
        for row in rows:
            self.observe(row)
        return [Alarm(name, "stop", reason) for name, reason in self.holding.items() if self._rules[name][0] == "stop"]


def not_finite(metrics: Mapping[str, float]) -> Alarm | None:
    """The alarm of an update that must not reach the engines, or must not be made. It always stops a run."""
    bad = [f"{name} is {metrics[name]}" for name in _MUST_BE_FINITE if not math.isfinite(metrics.get(name, 0.0))]
    return Alarm(NOT_FINITE, "stop", " and ".join(bad)) if bad else None
