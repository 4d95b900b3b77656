"""Token losses, as sums: the caller divides by the number of trained tokens of the whole (global) mini-batch.

Sums make the result independent of how the batch is cut into micro-batches and ranks. `T` is a number of tokens;
`mask_T` (bool or 0/1) tells which of them count: what is not counted may hold anything, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_token_loss(
    logprobs_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor, mask_T: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), summed over tokens.

    Sources: PPO, arXiv 1707.06347, equation 7; separate bounds (clip-higher): DAPO, arXiv 2503.14476, section 3.1.

    Returns:
        The sum of the losses, and the number of tokens whose clipped term is the one that counts (no gradient).
    """
    ratio_T = _ratio(logprobs_T, behaviour_T, mask_T)
    advantages_T = _masked(advantages_T, mask_T)
    plain_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    return -torch.minimum(plain_T, clipped_T).sum(), (clipped_T < plain_T).sum()


def dual_clipped_token_loss(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    clip_low: float,
    clip_high: float,
    bound: float,
) -> Tensor:
    """The clipped surrogate that also stops at `bound` x A where A < 0. The sum over tokens.

    Source: "Mastering Complex Control in MOBA Games", arXiv 1912.09729, equation 5; `bound` > 1 is its c.
    """
    ratio_T = _ratio(logprobs_T, behaviour_T, mask_T)
    advantages_T = _masked(advantages_T, mask_T)
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    surrogate_T = torch.minimum(ratio_T * advantages_T, clipped_T)
    bounded_T = torch.where(advantages_T < 0, torch.maximum(surrogate_T, bound * advantages_T), surrogate_T)
    return -bounded_T.sum()


def k1_kl(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """log p - log q of each token: unbiased for KL(p || q) on samples of p, of either sign.

    Source of k1, k2 and k3: J. Schulman, "Approximating KL Divergence", 2020.
    """
    return logprobs_T - reference_T


def k2_kl(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Half the squared log-ratio of each token: biased, low variance, never negative."""
    return 0.5 * (logprobs_T - reference_T).square()


def k3_kl(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) of each token: unbiased and never negative. The KL term of GRPO (arXiv 2402.03300, eq. 4)."""
    log_ratio_T = reference_T - logprobs_T
    return torch.expm1(log_ratio_T) - log_ratio_T


def _ratio(logprobs_T: Tensor, behaviour_T: Tensor, mask_T: Tensor) -> Tensor:
    # Masked before exp: a NaN or an overflow there would reach the gradient even through a product with 0.
    return _masked(logprobs_T - behaviour_T, mask_T).exp()


def _masked(values_T: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T.bool(), values_T, torch.zeros_like(values_T))
