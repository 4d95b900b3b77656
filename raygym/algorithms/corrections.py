"""What stands between the engine that sampled and the learner that trains: weights of tokens, one function a method.

The ratio is that of the proximal policy (the learner before its step's first update) to the behaviour policy (the
engine, perhaps with older weights). A weight has no gradient and multiplies the policy loss of its token, not the KL
and entropy terms. What is masked or rejected has weight 0 and still counts in the mean over tokens or sequences, as in
IcePop's objective: every rank knows the count before anything is computed.

Legend: T trained tokens, with `mask_T` and `sequence_T` as in `losses.py`. Weights are 0 where the mask is.
"""

from __future__ import annotations

from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from raygym.algorithms.means import sequence_means, sequence_sums
from raygym.method_config import Correction

LARGEST_LOG_RATIO = 20.0
"""exp of more is taken as exp of this: without a cap, one token would otherwise overflow the whole sum."""


class TokenWeights(NamedTuple):
    """What a correction says of each token."""

    weights_T: Tensor
    bounded_T: Tensor
    """bool: truncated, masked or rejected."""


def correction_weights(
    correction: Correction,
    proximal_T: Tensor,
    behaviour_T: Tensor,
    mask_T: Tensor,
    sequence_T: Tensor,
    cap: float,
    low: float,
) -> TokenWeights:
    """The weights by `learner.correction`.

    Args:
        correction: which method; `none` weighs by the ratio itself, as the decoupled loss of AReaL has it
            (arXiv 2505.24298, after "Batch size-invariance for policy optimization", arXiv 2110.00641).
        proximal_T: logprobs of the learner before its step's first update.
        behaviour_T: logprobs of the engine.
        mask_T: which tokens count.
        sequence_T: which tokens belong together.
        cap: upper bound; without meaning for `none`.
        low: lower bound of `masked` and `rejected_sequence`.
    """
    log_ratio_T = torch.where(mask_T.bool(), proximal_T - behaviour_T, torch.zeros_like(proximal_T)).detach()
    match correction:
        case "none":
            weights_T, bounded_T = _exp(log_ratio_T), torch.zeros_like(log_ratio_T, dtype=torch.bool)
        case "truncated_token":
            weights_T, bounded_T = truncated(log_ratio_T, cap)
        case "truncated_sequence":
            weights_T, bounded_T = truncated(sequence_sums(log_ratio_T, sequence_T), cap)
        case "masked":
            weights_T, bounded_T = masked(log_ratio_T, low, cap)
        case "rejected_sequence":
            weights_T, bounded_T = rejected(sequence_means(log_ratio_T, mask_T, sequence_T), low, cap)
        case _:
            assert_never(correction)
    return TokenWeights(weights_T * mask_T.to(weights_T.dtype), bounded_T & mask_T.bool())


def truncated(log_ratio_T: Tensor, cap: float) -> TokenWeights:
    """Truncated importance sampling: min(ratio, cap). With log-ratios of whole sequences, their sums, the same of them.

    Sources: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025, for tokens;
    of sequences: J. Liu et al., "When Speed Kills Stability", 2025. Truncation itself: Ionides, 2008.
    """
    ratio_T = _exp(log_ratio_T)
    return TokenWeights(ratio_T.clamp(max=cap), ratio_T > cap)


def masked(log_ratio_T: Tensor, low: float, cap: float) -> TokenWeights:
    """IcePop: the ratio where low <= ratio <= cap, else 0.

    Source: the Ring-1T report, arXiv 2510.18855, whose bounds are 0.5 and 5.
    """
    ratio_T = _exp(log_ratio_T)
    outside_T = (ratio_T < low) | (ratio_T > cap)
    return TokenWeights(ratio_T.masked_fill(outside_T, 0.0), outside_T)


def rejected(mean_log_ratio_T: Tensor, low: float, cap: float) -> TokenWeights:
    """Sequence rejection: 1 where low <= the sequence's geometric mean of ratios <= cap, else 0: chosen, not weighed.

    Source: J. Liu et al., "When Speed Kills Stability", 2025, part 3: a bound on the mean, unlike one on the product,
    means the same for long sequences as for short ones, and is tight (1.0001 to 1.001).

    Args:
        mean_log_ratio_T: for each token the mean log-ratio of its sequence.
        low: lower bound, such as 1 / cap.
        cap: upper bound.
    """
    mean_T = _exp(mean_log_ratio_T)
    outside_T = (mean_T < low) | (mean_T > cap)
    return TokenWeights((~outside_T).to(mean_T.dtype), outside_T)


def _exp(log_ratio_T: Tensor) -> Tensor:
    return log_ratio_T.clamp(max=LARGEST_LOG_RATIO).exp()
