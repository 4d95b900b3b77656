"""The losses of tokens: one short function per published method.

`T` is a number of trained tokens; `mask_T` (bool or 0/1) tells which of them count: what is not counted may hold
anything, NaN included, and gets a loss of 0. `sequence_T` (int64, each 0 <= number < T) tells which tokens belong
together: those of one sequence, all of which are present, share a number. How losses become one number is `means.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from raygym.algorithms.means import sequence_means


class TokenLosses(NamedTuple):
    """What a policy loss says of each token."""

    losses_T: Tensor
    """With gradient."""
    clipped_T: Tensor
    """bool: the bound on the ratio is what counts for this token."""


def clipped_token_loss(
    logprobs_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor, mask_T: Tensor, clip_low: float, clip_high: float
) -> TokenLosses:
    """PPO's clipped surrogate, -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A). Clipped: no gradient.

    Sources: PPO, arXiv 1707.06347, equation 7; separate bounds (clip-higher): DAPO, arXiv 2503.14476, section 3.1.
    """
    return _clipped(_ratio(logprobs_T, behaviour_T, mask_T), _masked(advantages_T, mask_T), clip_low, clip_high)


def dual_clipped_token_loss(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    clip_low: float,
    clip_high: float,
    bound: float,
) -> TokenLosses:
    """The clipped surrogate that also stops at `bound` x A where A < 0. Clipped: by either, no gradient.

    Source: "Mastering Complex Control in MOBA Games", arXiv 1912.09729, equation 5; `bound` > 1 is its c.
    """
    advantages_T = _masked(advantages_T, mask_T)
    losses_T, clipped_T = clipped_token_loss(logprobs_T, behaviour_T, advantages_T, mask_T, clip_low, clip_high)
    limits_T = -bound * advantages_T
    beyond_T = (advantages_T < 0) & (losses_T > limits_T)
    return TokenLosses(torch.where(beyond_T, limits_T, losses_T), clipped_T | beyond_T)


def gspo_loss(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    sequence_T: Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLosses:
    """GSPO: the clipped surrogate with one ratio a sequence, exp(mean over its tokens of log p - log behaviour).

    Source: GSPO, arXiv 2507.18071, equations 5 to 7. Each token gets its sequence's loss, so that the mean over
    sequences of the mean over tokens is the paper's objective. Its bounds are small: 3e-4 and 4e-4. Clipped: the whole
    sequence, no gradient.
    """
    log_ratio_T = sequence_means(_masked(logprobs_T - behaviour_T, mask_T), mask_T, sequence_T)
    return _clipped(_masked(log_ratio_T, mask_T).exp(), _masked(advantages_T, mask_T), clip_low, clip_high)


def cispo_loss(
    logprobs_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor, mask_T: Tensor, clip_low: float, clip_high: float
) -> TokenLosses:
    """CISPO: -w A log p, w = clip(ratio, 1 - clip_low, 1 + clip_high) without gradient: every token keeps its own.

    Source: MiniMax-M1, arXiv 2506.13585, equations 4 and 5; the paper has no lower bound, which is `clip_low` 1.
    Clipped: those whose weight is bounded.
    """
    ratio_T = _ratio(logprobs_T, behaviour_T, mask_T).detach()
    weights_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    return TokenLosses(-weights_T * _masked(advantages_T, mask_T) * _masked(logprobs_T, mask_T), weights_T != ratio_T)


def reinforce_loss(logprobs_T: Tensor, advantages_T: Tensor, mask_T: Tensor) -> TokenLosses:
    """REINFORCE: -A log p. Exact on-policy only: nothing corrects for the policy that sampled. Clipped: none.

    Source: R. J. Williams, "Simple Statistical Gradient-Following Algorithms", 1992.
    """
    losses_T = -_masked(advantages_T, mask_T) * _masked(logprobs_T, mask_T)
    return TokenLosses(losses_T, torch.zeros_like(losses_T, dtype=torch.bool))


def k1_kl(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """log p - log q of each token: unbiased for KL(p || q) on samples of p, of either sign.

    Source of k1, k2 and k3: J. Schulman, "Approximating KL Divergence", 2020. As a loss, k1 pulls nowhere: on samples
    of p the mean of its gradient is 0, so it measures only.
    """
    return logprobs_T - reference_T


def k2_kl(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Half the squared log-ratio of each token: biased, low variance, never negative.

    As a loss it has, on samples of p, the gradient of KL(p || q).
    """
    return 0.5 * (logprobs_T - reference_T).square()


def k3_kl(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) of each token: unbiased and never negative. The KL term of GRPO (arXiv 2402.03300, eq. 4)."""
    log_ratio_T = reference_T - logprobs_T
    return torch.expm1(log_ratio_T) - log_ratio_T


KL_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"k1": k1_kl, "k2": k2_kl, "k3": k3_kl}
)
"""As `learner.kl_estimator` names them: of a policy's logprobs and the reference's."""


def _clipped(ratio_T: Tensor, advantages_T: Tensor, clip_low: float, clip_high: float) -> TokenLosses:
    plain_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    return TokenLosses(-torch.minimum(plain_T, clipped_T), clipped_T < plain_T)


def _ratio(logprobs_T: Tensor, behaviour_T: Tensor, mask_T: Tensor) -> Tensor:
    # Masked before exp: a NaN or an overflow there would reach the gradient even through a product with 0.
    return _masked(logprobs_T - behaviour_T, mask_T).exp()


def _masked(values_T: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T.bool(), values_T, torch.zeros_like(values_T))
