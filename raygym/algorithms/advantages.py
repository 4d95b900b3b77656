"""Advantages from rewards: one short function per published method, and `ADVANTAGES`, by the names of the config.

Legend: G episodes of one group, N episodes of all groups of a step. A method that looks at one group only is a function
of `rewards_G`; `ADVANTAGES` holds functions of all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from raygym.types import Float32Array

EPSILON = 1e-6
"""Keeps nearly equal rewards from being blown up."""

Groups = Sequence[Sequence[float]]
"""The G rewards of each group of a step; groups may differ in size."""
Advantages = Callable[[Groups], list[Float32Array]]
"""The G advantages of each group, float32."""


def group_normalized(rewards_G: Sequence[float]) -> Float32Array:
    """GRPO's advantage, (r - mean) / (std + 1e-6) with the n-1 standard deviation of the group.

    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2. A group of equal rewards (or of one episode) says nothing
    and gets exactly 0, not the rounding error of its mean divided by epsilon.
    """
    return standardized(rewards_G).astype(np.float32)


def standardized(rewards_G: Sequence[float]) -> NDArray[np.float64]:
    """`group_normalized` before it is rounded to float32."""
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if len(rewards) < 2:
        return np.zeros(len(rewards))
    standardized_G: NDArray[np.float64] = _centred(rewards) / (rewards.std(ddof=1) + EPSILON)
    return standardized_G


def group_centred(rewards_G: Sequence[float]) -> Float32Array:
    """Dr. GRPO's advantage, r - mean of the group: hard and easy tasks are not weighted up by a small deviation.

    Source: "Understanding R1-Zero-Like Training", arXiv 2503.20783, section 3.2. The paper's other half, the division
    by a constant length, is `learner.loss_mean: constant`.
    """
    return _centred(rewards_G).astype(np.float32)


def leave_one_out(rewards_G: Sequence[float]) -> Float32Array:
    """RLOO's advantage, r - mean of the other G - 1. It is Dr. GRPO's times G / (G - 1).

    Source: "Back to Basics", arXiv 2402.14740, section 2.2.

    Raises:
        ValueError: fewer than two episodes.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    baselines_G = leave_one_out_baseline(rewards_G)
    if np.all(rewards == rewards[0]):
        return np.zeros(len(rewards), dtype=np.float32)
    return (rewards - baselines_G).astype(np.float32)


def leave_one_out_baseline(rewards_G: Sequence[float]) -> NDArray[np.float64]:
    """RLOO's baseline of each episode: the mean reward of the other G - 1. Source and errors: `leave_one_out`."""
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if len(rewards) < 2:
        raise ValueError(f"a leave-one-out baseline needs a group of at least 2 episodes, found {len(rewards)}")
    baselines_G: NDArray[np.float64] = (rewards.sum() - rewards) / (len(rewards) - 1)
    return baselines_G


def batch_normalized(groups: Groups) -> list[Float32Array]:
    """REINFORCE++: (r - mean) / (std + 1e-6), both of all N episodes of the step; groups play no part.

    Source: REINFORCE++, arXiv 2501.03262: the variant without a group's baseline, for rewards of whole episodes. The
    deviation divides by N and counts each episode once, not each token. The paper's KL penalty is not in the reward
    here: `learner.kl_in: reward` puts it there, token by token (`kl_in_reward.py`).
    """
    rewards_N = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups]) if groups else np.zeros(0)
    return _divided(_centred(rewards_N), [len(group) for group in groups])


def batch_normalized_with_baseline(groups: Groups) -> list[Float32Array]:
    """REINFORCE++ with baseline: r - mean of its group, divided by (std + 1e-6) of these differences of all N episodes.

    Source: REINFORCE++, arXiv 2501.03262: the variant for several samples of a prompt. The deviation divides by N; the
    mean of all differences is 0 already. A group of equal rewards gets exactly 0.
    """
    return divided_by_step_deviation([_centred(group) for group in groups])


def divided_by_step_deviation(centred: Sequence[NDArray[np.float64]]) -> list[Float32Array]:
    """Values that have a mean of 0 in each group, divided by (std + 1e-6) of all N of the step."""
    return _divided(np.concatenate(centred) if centred else np.zeros(0), [len(group) for group in centred])


def overlong_penalized(
    rewards_G: Sequence[float], lengths_G: Sequence[int], max_length: int, buffer: int, penalty: float
) -> Float32Array:
    """DAPO's soft overlong punishment: `penalty` per `buffer` tokens beyond `max_length - buffer` off each reward.

    Source: DAPO, arXiv 2503.14476, section 3.4. Lengths and limits are in tokens.
    """
    over = np.maximum(np.asarray(lengths_G, dtype=np.float64) - (max_length - buffer), 0.0)
    return (np.asarray(rewards_G, dtype=np.float64) - penalty * over / buffer).astype(np.float32)


def _centred(rewards: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Rewards - their mean; of equal ones exactly 0, which the rounding of a mean would not give."""
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) == 0 or np.all(values == values[0]):
        return np.zeros(len(values))
    centred: NDArray[np.float64] = values - values.mean()
    return centred


def _divided(centred_N: NDArray[np.float64], sizes: list[int]) -> list[Float32Array]:
    if not sizes:
        return []
    advantages_N: Float32Array = (centred_N / (centred_N.std() + EPSILON)).astype(np.float32)
    return np.split(advantages_N, np.cumsum(sizes)[:-1])


def _group_by_group(method: Callable[[Sequence[float]], Float32Array], groups: Groups) -> list[Float32Array]:
    return [method(rewards_G) for rewards_G in groups]


ADVANTAGES: Mapping[str, Advantages] = MappingProxyType(
    {
        "grpo": partial(_group_by_group, group_normalized),
        "dr_grpo": partial(_group_by_group, group_centred),
        "rloo": partial(_group_by_group, leave_one_out),
        "reinforce_pp": batch_normalized,
        "reinforce_pp_baseline": batch_normalized_with_baseline,
    }
)
"""The methods, as `learner.advantage` names them; beside them `gdpo`, which needs more than a reward."""
