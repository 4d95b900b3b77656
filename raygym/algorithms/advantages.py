"""Advantages of one group's rewards: one short function per published method. `G` is the group's size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raygym.types import Float32Array

EPSILON = 1e-6
"""Keeps nearly equal rewards from being blown up."""


def group_normalized(rewards_G: Sequence[float]) -> Float32Array:
    """GRPO's advantage, (r - mean) / (std + 1e-6) with the n-1 standard deviation of the group.

    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2. A group of equal rewards (or of one episode) says nothing
    and gets exactly 0, not the rounding error of its mean divided by epsilon.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if len(rewards) < 2 or np.all(rewards == rewards[0]):
        return np.zeros(len(rewards), dtype=np.float32)
    advantages_G: Float32Array = ((rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)).astype(np.float32)
    return advantages_G


def leave_one_out_baseline(rewards_G: Sequence[float]) -> Float32Array:
    """RLOO's baseline of each episode: the mean reward of the other G - 1.

    Source: "Back to Basics", arXiv 2402.14740, section 2.2.

    Raises:
        ValueError: fewer than two episodes.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if len(rewards) < 2:
        raise ValueError(f"a leave-one-out baseline needs a group of at least 2 episodes, found {len(rewards)}")
    baselines_G: Float32Array = ((rewards.sum() - rewards) / (len(rewards) - 1)).astype(np.float32)
    return baselines_G


def overlong_penalized(
    rewards_G: Sequence[float], lengths_G: Sequence[int], max_length: int, buffer: int, penalty: float
) -> Float32Array:
    """DAPO's soft overlong punishment: `penalty` per `buffer` tokens beyond `max_length - buffer` off each reward.

    Source: DAPO, arXiv 2503.14476, section 3.4. Lengths and limits are in tokens.
    """
    over = np.maximum(np.asarray(lengths_G, dtype=np.float64) - (max_length - buffer), 0.0)
    return (np.asarray(rewards_G, dtype=np.float64) - penalty * over / buffer).astype(np.float32)
