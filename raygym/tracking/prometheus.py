"""Which of a row's numbers Prometheus gets, under which names. Ray puts `ray_` before them and exports them by node."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from raygym.run_row import Row, scalars

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
_REST = "<name>"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric of Prometheus."""

    name: str
    """Without Ray's prefix. A counter's ends in `_total`."""
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    source: str
    """Key of metrics.jsonl. `<name>` in it stands for what becomes the value of `label`."""
    label: str = ""
    each_step: bool = False
    """A gauge that is 0 where a step has no such key."""

    @property
    def exported(self) -> tuple[str, ...]:
        """The names of its series in Prometheus."""
        suffixes = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return tuple(f"ray_{self.name}{suffix}" for suffix in suffixes)


@dataclass(frozen=True, slots=True)
class Reading:
    """A value of a family: what a gauge is set to, a counter is increased by, or a histogram gets."""

    family: Family
    value: float
    label: str = ""
    """Value of the family's label."""


FAMILIES = (
    Family("raygym_step", "gauge", "Steps that were made", "step"),
    Family("raygym_reward_mean", "gauge", "Mean reward of a step's episodes", "reward/mean"),
    Family("raygym_reward_std", "gauge", "Standard deviation of these rewards", "reward/std"),
    Family("raygym_env_reward_mean", "gauge", "Mean reward by environment", "reward/mean/<name>", "env"),
    Family("raygym_validation_reward", "gauge", "Mean reward of the newest validation", "val/reward"),
    Family("raygym_policy_version", "gauge", "Weight version that was trained", "policy/version"),
    Family("raygym_policy_staleness_max", "gauge", "Versions between sampling and training", "policy/staleness_max"),
    Family("raygym_policy_entropy", "gauge", "Mean entropy of the policy, in nats", "policy/entropy"),
    Family("raygym_policy_kl", "gauge", "KL divergence to the sampling policy, in nats", "policy/kl"),
    Family("raygym_policy_clip_fraction", "gauge", "Share of tokens whose ratio was clipped", "policy/clip_fraction"),
    Family(
        "raygym_policy_logprob_abs_diff", "gauge", "Mean difference of a token's logprob, learner to engine",
        "policy/logprob_abs_diff",
    ),
    Family("raygym_loss", "gauge", "Loss of the step's updates", "loss"),
    Family("raygym_grad_norm", "gauge", "Norm of the gradient before clipping", "grad/norm"),
    Family("raygym_learning_rate", "gauge", "Learning rate of the last update", "lr"),
    Family("raygym_tokens_drift_rate", "gauge", "Share of episodes that render otherwise", "tokens/drift_rate"),
    Family("raygym_tokens_padding_fraction", "gauge", "Share of padding in micro-batches", "tokens/padding_fraction"),
    Family("raygym_learn_tokens_per_second", "gauge", "Speed of the learners", "learn/tokens_per_s"),
    Family("raygym_part_seconds", "gauge", "Time of a step by its part", "time/<name>_s", "part"),
    Family("raygym_env_step_seconds", "gauge", "Mean time of an environment's step", "env/<name>/step_s", "env"),
    Family("raygym_concurrency", "gauge", "Episodes that may run at once", "manager/concurrency"),
    Family("raygym_manager_loop_lag_ms", "gauge", "99th percentile of the manager's lag", "manager/loop_lag_ms_p99"),
    Family("raygym_sync_gib_per_second", "gauge", "Speed of a weight update", "sync/gib_per_s"),
    Family("raygym_sync_fenced", "gauge", "Replicas that did not come to the version in time", "sync/fenced"),
    Family("raygym_alarm", "gauge", "1 where this alarm holds", "alarms/<name>", "alarm", each_step=True),
    Family("raygym_steps_total", "counter", "Steps made by this process", "time/step_s"),
    Family("raygym_episodes_completed_total", "counter", "Episodes that were trained", "episodes/completed"),
    Family("raygym_episodes_failed_total", "counter", "Failed attempts by kind", "episodes/failed/<name>", "kind"),
    Family("raygym_groups_dropped_total", "counter", "Groups given up", "groups/dropped"),
    Family("raygym_tokens_generated_total", "counter", "Tokens that the policy generated", "tokens/generated"),
    Family("raygym_tokens_trained_total", "counter", "Tokens in the loss", "tokens/trained"),
    Family("raygym_sync_bytes_total", "counter", "Bytes of weights that were sent", "sync/sent_bytes"),
    Family("raygym_part_restarts_total", "counter", "Lost parts by kind", "supervision/<name>_restarts", "part"),
    Family("raygym_step_duration_seconds", "histogram", "Time of a step", "time/step_s"),
    Family("raygym_sync_duration_seconds", "histogram", "Time of a weight update", "time/sync_s"),
)  # fmt: skip
BOUNDARIES = _SECONDS
"""Of every histogram, in seconds."""


class Readings:
    """What the rows of one run are in Prometheus. It remembers which alarms have held, to set them back to 0."""

    def __init__(self) -> None:
        self._seen: dict[Family, set[str]] = {family: set() for family in FAMILIES if family.each_step}

    def of(self, step: int, row: Row) -> Iterator[Reading]:
        """The readings of one row."""
        values = {name: value for name, value in scalars(row).items() if math.isfinite(value)} | {"step": float(step)}
        for family in FAMILIES:
            found = dict(_matching(family, values))
            if family.each_step:
                gone = self._seen[family] - found.keys()
                self._seen[family] |= found.keys()
                found |= dict.fromkeys(gone, 0.0)
            for label, value in found.items():
                # It counts steps, not their seconds.
                yield Reading(family, 1.0 if family.name == "raygym_steps_total" else value, label)


def _matching(family: Family, values: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Label and value of each key that the family is made of."""
    if not family.label:
        if family.source in values:
            yield "", values[family.source]
        return
    before, after = family.source.split(_REST)
    for name, value in values.items():
        if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
            yield name[len(before) : len(name) - len(after)], value
