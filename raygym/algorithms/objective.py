"""What a learner minimises: the config's policy loss, KL and entropy terms, over the trained tokens of a micro-batch.

Three policies can be apart: behaviour (the engine that sampled), proximal (the learner before its step's first update)
and the current one. Without decoupling, losses take the ratio of the current to the behaviour policy. With it they take
that to the proximal one, and are weighed by proximal / behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raygym.algorithms.corrections import TokenWeights, correction_weights
from raygym.algorithms.losses import (
    KL_ESTIMATORS,
    TokenLosses,
    cispo_loss,
    clipped_token_loss,
    dual_clipped_token_loss,
    gspo_loss,
    reinforce_loss,
)
from raygym.algorithms.means import mini_batch_divisor, sequence_means, token_weights
from raygym.config import LearnerConfig
from raygym.packing import MicroBatch
from raygym.types import TrainSequence


class Objective(NamedTuple):
    """Sums over one micro-batch. Scalars."""

    loss: Tensor
    """With gradient: weighted, all terms together; to be divided by `loss_divisor`."""
    reference_kl: Tensor
    """Over tokens, unweighted; 0 without a reference."""
    clipped: Tensor
    """Tokens whose ratio is bounded."""
    clipped_high: Tensor
    """Those of them whose ratio is bounded from above."""
    corrected: Tensor
    """Tokens whose weight is bounded: truncated, masked or rejected."""
    correction: Tensor
    """Of the tokens' weights: their number where losses are not weighed."""


def objective(
    config: LearnerConfig,
    batch: MicroBatch,
    logprobs_N: Tensor,
    reference_N: Tensor | None = None,
    *,
    proximal_N: Tensor | None = None,
    entropies_N: Tensor | None = None,
) -> Objective:
    """The objective of one micro-batch.

    Args:
        config: which loss, mean, correction and KL estimator; resolved.
        batch: whole sequences, packed.
        logprobs_N: of the policy that learns, with gradient.
        reference_N: logprobs of the starting policy, where the loss has a KL term.
        proximal_N: logprobs of the policy before its step's first update, where losses are weighed by them.
        entropies_N: with gradient, where there is an entropy bonus.
    """
    weights_N, bounded_N = _weights(config, batch, proximal_N)
    anchor_N = batch.behaviour_N
    if config.decoupled is True:
        assert proximal_N is not None
        anchor_N = proximal_N.detach()
    losses_N, clipped_N = policy_losses(config, batch, logprobs_N, anchor_N)
    losses_N = losses_N * weights_N
    reference_kl_N = torch.zeros_like(losses_N)
    if reference_N is not None:
        reference_kl_N = KL_ESTIMATORS[config.kl_estimator](logprobs_N, reference_N) * batch.mask_N
        losses_N = losses_N + config.kl_coef * reference_kl_N
    if config.entropy_coef:
        assert entropies_N is not None
        losses_N = losses_N - config.entropy_coef * entropies_N * batch.mask_N
    means_N = token_weights(config.loss_mean, batch.mask_N, batch.sequence_N, losses_N.dtype)
    clipped_high_N = clipped_N & _above_one(config, batch, logprobs_N, anchor_N)
    return Objective(
        loss=(losses_N * means_N).sum(),
        reference_kl=reference_kl_N.detach().sum(),
        clipped=clipped_N.sum(),
        clipped_high=clipped_high_N.sum(),
        corrected=bounded_N.sum(),
        correction=weights_N.sum(),
    )


def _weights(config: LearnerConfig, batch: MicroBatch, proximal_N: Tensor | None) -> TokenWeights:
    if not config.weighs_tokens:
        ones_N = batch.mask_N.to(batch.behaviour_N.dtype)
        return TokenWeights(ones_N, torch.zeros_like(ones_N, dtype=torch.bool))
    assert proximal_N is not None and config.correction != "auto"
    cap, low = config.correction_cap or math.inf, config.correction_low or 0.0
    return correction_weights(
        config.correction, proximal_N, batch.behaviour_N, batch.mask_N, batch.sequence_N, cap, low
    )


def policy_losses(config: LearnerConfig, batch: MicroBatch, logprobs_N: Tensor, anchor_N: Tensor) -> TokenLosses:
    """Each trained token's loss by `learner.loss`, with ratios to the policy whose logprobs are `anchor_N`."""
    advantages_N, mask_N = batch.advantages_N, batch.mask_N
    low, high = config.clip_low, config.clip_high
    match config.loss:
        case "gspo":
            return gspo_loss(logprobs_N, anchor_N, advantages_N, mask_N, batch.sequence_N, low, high)
        case "cispo":
            return cispo_loss(logprobs_N, anchor_N, advantages_N, mask_N, low, high)
        case "reinforce":
            return reinforce_loss(logprobs_N, advantages_N, mask_N)
        case "clip":
            if config.dual_clip is None:
                return clipped_token_loss(logprobs_N, anchor_N, advantages_N, mask_N, low, high)
            bound = config.dual_clip
            return dual_clipped_token_loss(logprobs_N, anchor_N, advantages_N, mask_N, low, high, bound)


def _above_one(config: LearnerConfig, batch: MicroBatch, logprobs_N: Tensor, anchor_N: Tensor) -> Tensor:
    """Whether the ratio that the loss bounds is above 1, for each token."""
    log_ratio_N = torch.where(batch.mask_N, logprobs_N.detach() - anchor_N, 0.0)
    if config.loss == "gspo":
        log_ratio_N = sequence_means(log_ratio_N, batch.mask_N, batch.sequence_N)
    return log_ratio_N > 0


def loss_divisor(config: LearnerConfig, mini_batch: Sequence[TrainSequence]) -> float:
    """What the losses of a whole mini-batch, all ranks together, are divided by; see `mini_batch_divisor`."""
    trained = [int(sequence.loss_mask.sum()) for sequence in mini_batch]
    return mini_batch_divisor(config.loss_mean, trained, config.loss_length)
