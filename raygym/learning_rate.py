"""The learning rate of each optimizer update, from its number alone: a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

from raygym.learner_config import LearnerConfig, LrSchedule


def learning_rate(config: LearnerConfig, update: int, total: int | None = None) -> float:
    """The rate of update `update`, counted from 0.

    It rises linearly over `warmup_steps` updates to `lr`, and then follows `lr_schedule` towards `lr_min`, which would
    be reached by the update after the last one: each of them moves the policy, also with an `lr_min` of 0.

    Args:
        config: `learner` of the run.
        update: updates made before this one.
        total: updates of the whole run; the rate stays at `lr_min` beyond it.

    Raises:
        ValueError: the schedule falls, and `total` is None.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    if total is None:
        raise ValueError(f"lr_schedule: {config.lr_schedule} falls until the last update; expected how many there are")
    done = (update - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr_min + (config.lr - config.lr_min) * _SHARES[config.lr_schedule](min(1.0, done))


# What is left of the way down to `lr_min` after a share (0 to 1) of the updates. Cosine: SGDR, arXiv 1608.03983, eq. 5.
_SHARES: dict[LrSchedule, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + cos(pi * done)) / 2,
}
