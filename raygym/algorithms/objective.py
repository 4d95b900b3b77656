"""What a learner minimises: the config's policy loss and KL term, over the trained tokens of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from raygym.algorithms.losses import (
    TokenLosses,
    cispo_loss,
    clipped_token_loss,
    dual_clipped_token_loss,
    gspo_loss,
    k1_kl,
    k2_kl,
    k3_kl,
    reinforce_loss,
)
from raygym.algorithms.means import mini_batch_divisor, sequence_means, token_weights
from raygym.config import LearnerConfig
from raygym.packing import MicroBatch
from raygym.types import TrainSequence

KL_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"k1": k1_kl, "k2": k2_kl, "k3": k3_kl}
)


class Objective(NamedTuple):
    """Sums over one micro-batch. Scalars."""

    loss: Tensor
    """With gradient: weighted, policy loss and KL term together; to be divided by `loss_divisor`."""
    reference_kl: Tensor
    """Over tokens, unweighted; 0 without a reference."""
    clipped: Tensor
    """Tokens whose ratio is bounded."""
    clipped_high: Tensor
    """Those of them whose ratio is bounded from above."""


def objective(
    config: LearnerConfig, batch: MicroBatch, logprobs_N: Tensor, reference_N: Tensor | None = None
) -> Objective:
    """The objective of one micro-batch.

    Args:
        config: which loss, mean and KL estimator.
        batch: whole sequences, packed.
        logprobs_N: of the policy that learns, with gradient.
        reference_N: logprobs of the starting policy, where `kl_coef` is above 0.
    """
    losses_N, clipped_N = policy_losses(config, batch, logprobs_N)
    reference_kl_N = torch.zeros_like(losses_N)
    if reference_N is not None:
        reference_kl_N = KL_ESTIMATORS[config.kl_estimator](logprobs_N, reference_N) * batch.mask_N
        losses_N = losses_N + config.kl_coef * reference_kl_N
    weights_N = token_weights(config.loss_mean, batch.mask_N, batch.sequence_N, losses_N.dtype)
    clipped_high_N = clipped_N & _above_one(config, batch, logprobs_N)
    loss = (losses_N * weights_N).sum()
    return Objective(loss, reference_kl_N.detach().sum(), clipped_N.sum(), clipped_high_N.sum())


def policy_losses(config: LearnerConfig, batch: MicroBatch, logprobs_N: Tensor) -> TokenLosses:
    """Each trained token's loss by `learner.loss`."""
    behaviour_N, advantages_N, mask_N = batch.behaviour_N, batch.advantages_N, batch.mask_N
    low, high = config.clip_low, config.clip_high
    match config.loss:
        case "gspo":
            return gspo_loss(logprobs_N, behaviour_N, advantages_N, mask_N, batch.sequence_N, low, high)
        case "cispo":
            return cispo_loss(logprobs_N, behaviour_N, advantages_N, mask_N, low, high)
        case "reinforce":
            return reinforce_loss(logprobs_N, advantages_N, mask_N)
        case "clip":
            if config.dual_clip is None:
                return clipped_token_loss(logprobs_N, behaviour_N, advantages_N, mask_N, low, high)
            bound = config.dual_clip
            return dual_clipped_token_loss(logprobs_N, behaviour_N, advantages_N, mask_N, low, high, bound)


def _above_one(config: LearnerConfig, batch: MicroBatch, logprobs_N: Tensor) -> Tensor:
    """Whether the ratio that the loss bounds is above 1, for each token."""
    log_ratio_N = torch.where(batch.mask_N, logprobs_N.detach() - batch.behaviour_N, 0.0)
    if config.loss == "gspo":
        log_ratio_N = sequence_means(log_ratio_N, batch.mask_N, batch.sequence_N)
    return log_ratio_N > 0


def loss_divisor(config: LearnerConfig, mini_batch: Sequence[TrainSequence]) -> float:
    """What the losses of a whole mini-batch, all ranks together, are divided by; see `mini_batch_divisor`."""
    trained = [int(sequence.loss_mask.sum()) for sequence in mini_batch]
    return mini_batch_divisor(config.loss_mean, trained, config.loss_length)
