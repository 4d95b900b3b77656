"""KL to the starting policy as a part of the reward: before there are advantages, instead of a term of the loss.

Legend: T trained tokens of one episode, N episodes of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raygym.algorithms.advantages import EPSILON
from raygym.types import Float32Array


def kl_penalties(
    behaviour_T: Float32Array, reference_T: Float32Array, coefficient: float, estimator: str
) -> NDArray[np.float64]:
    """coefficient x the KL estimate of each token, to be subtracted from its reward.

    Source: RLHF's reward, r - beta log(p / q) token by token (InstructGPT, arXiv 2203.02155, equation 2), where p
    is the policy that sampled. That is `k1`; the other estimators are as in `losses.py`.

    Args:
        behaviour_T: logprobs of the policy that sampled.
        reference_T: logprobs of the starting policy.
        coefficient: `learner.kl_coef`.
        estimator: of `KL_ESTIMATORS`.
    """
    # The driver computes this, and needs PyTorch for nothing else.
    import torch

    from raygym.algorithms.losses import KL_ESTIMATORS

    values = KL_ESTIMATORS[estimator](
        torch.as_tensor(np.asarray(behaviour_T, np.float64)), torch.as_tensor(np.asarray(reference_T, np.float64))
    )
    penalties_T: NDArray[np.float64] = coefficient * values.numpy()
    return penalties_T


def penalized_to_go(reward: float, penalties_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each token, the reward at the end minus the penalties from it on: REINFORCE++, arXiv 2501.03262, with a
    discount of 1 between tokens."""
    to_go_T: NDArray[np.float64] = reward - np.cumsum(penalties_T[::-1])[::-1]
    return to_go_T


def token_normalized(returns_NT: Sequence[NDArray[np.float64]]) -> list[Float32Array]:
    """(R - mean) / (std + 1e-6), both of all trained tokens of the step: each token counts once.

    Source: REINFORCE++, arXiv 2501.03262. The deviation divides by the number of tokens. Equal returns give exactly 0.
    """
    everything = np.concatenate(returns_NT) if returns_NT else np.zeros(0)
    if len(everything) == 0 or np.all(everything == everything[0]):
        return [np.zeros(len(returns_T), dtype=np.float32) for returns_T in returns_NT]
    mean, deviation = everything.mean(), everything.std()
    return [((returns_T - mean) / (deviation + EPSILON)).astype(np.float32) for returns_T in returns_NT]
