"""Advantages from several rewards: each is normalised before they are summed, so that none drowns the others.

Legend: G episodes of one group, N episodes of all groups of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raygym.algorithms.advantages import divided_by_step_deviation, standardized
from raygym.types import Float32Array

WHOLE = "reward"
"""What the reward of an episode that names no components is called."""

Components = Mapping[str, float]
"""The rewards of one episode, by name."""


def decoupled_normalized(groups: Sequence[Sequence[Components]], weights: Mapping[str, float]) -> list[Float32Array]:
    """GDPO: A = sum over rewards k of w_k (r_k - mean_k) / (std_k + 1e-6), then divided by its deviation over the step.

    Source: GDPO, arXiv 2601.05242: mean and (n-1) deviation of each reward are those of the group; then the
    sums are normalised over all N episodes of the step, so that their scale does not grow with the number of rewards.
    The mean of all sums is 0 already, since that of each group is. The deviation divides by N. Where all episodes of a
    group are equal in every reward, it gets exactly 0.

    Args:
        groups: components of each episode. One that an episode does not have counts as 0.
        weights: by name; 1 where a name is missing.

    Returns:
        The G advantages of each group, float32.
    """
    return divided_by_step_deviation([_weighted_sum(group, weights) for group in groups])


def _weighted_sum(group: Sequence[Components], weights: Mapping[str, float]) -> NDArray[np.float64]:
    total_G = np.zeros(len(group))
    for name in sorted({name for components in group for name in components}):
        total_G += weights.get(name, 1.0) * standardized([components.get(name, 0.0) for components in group])
    return total_G


def weighted_reward(components: Components, weights: Mapping[str, float]) -> float:
    """The sum of an episode's rewards, each times its weight: 1 where a name is missing."""
    return float(sum(weights.get(name, 1.0) * reward for name, reward in components.items()))
