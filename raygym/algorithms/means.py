"""How the losses of tokens become one number: the sum of loss x weight, divided by what a whole mini-batch amounts to.

A token's weight needs its own sequence only, and sequences are never split, so any part of a mini-batch (a micro-batch,
a rank's share) can be summed by itself. The divisor is of the whole mini-batch, which every rank knows. So the result
does not depend on how the mini-batch is cut or packed.

Legend: T trained tokens, with `mask_T` and `sequence_T` as in `losses.py`. A sequence without a trained token counts
nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raygym.method_config import LossMean


def token_weights(mean: LossMean, mask_T: Tensor, sequence_T: Tensor, dtype: torch.dtype) -> Tensor:
    """1 for each token that counts, or with `sequence` 1 / the number of them in its sequence; else 0."""
    mask_T = mask_T.to(dtype)
    if mean != "sequence":
        return mask_T
    return mask_T / sequence_sums(mask_T, sequence_T).clamp(min=1)


def mini_batch_divisor(mean: LossMean, trained_tokens: Sequence[int], loss_length: int | None) -> float:
    """What the weighted sum over a whole mini-batch is divided by: 0 where nothing is trained, else at least 1.

    Args:
        mean: `token`, all trained tokens: each counts the same (DAPO, arXiv 2503.14476, section 3.3); `sequence`, the
            number of sequences: each counts the same (GRPO, arXiv 2402.03300, equation 3); `constant`, the number of
            sequences x `loss_length`: a token counts the same whatever else is in the mini-batch (Dr. GRPO,
            arXiv 2503.20783, section 3.2).
        trained_tokens: of each sequence of the mini-batch.
        loss_length: tokens, with `constant`.
    """
    if mean == "token":
        return float(sum(trained_tokens))
    sequences = float(sum(tokens > 0 for tokens in trained_tokens))
    if mean == "sequence":
        return sequences
    assert loss_length is not None, "the config asks for it"
    return sequences * loss_length


def sequence_means(values_T: Tensor, mask_T: Tensor, sequence_T: Tensor) -> Tensor:
    """For each token the mean over its sequence's tokens that count; `values_T` is 0 where they do not."""
    counts_T = sequence_sums(mask_T.to(values_T.dtype), sequence_T)
    return sequence_sums(values_T, sequence_T) / counts_T.clamp(min=1)


def sequence_sums(values_T: Tensor, sequence_T: Tensor) -> Tensor:
    """For each token the sum over its sequence."""
    return torch.zeros_like(values_T).index_add(0, sequence_T, values_T)[sequence_T]
