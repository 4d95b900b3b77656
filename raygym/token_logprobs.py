"""Log-probabilities and entropies of given tokens from logits, with a backward pass that needs no memory of its own.

PyTorch's own operations keep several arrays of C x V for their gradients and go over each of them several times. Here
the logits are kept and, in the backward pass, become their own gradient, a block of rows at a time: on a CPU a block
stays in the cache.

Legend: C tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK_BYTES = {"cpu": 2**20}
_DEFAULT_BLOCK_BYTES = 2**28


def token_logprobs(logits_CV: Tensor, target_ids_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of each target ID its log-probability, and the entropy of its distribution, in nats. Both with gradient.

    They are fp32, or float64 as the logits are.

    Args:
        logits_CV: of any float type. Nobody else may need their values in a backward pass, which overwrites them; so
            there can be only one.
        target_ids_C: int64.
        temperature: above 0; logits are divided by it.
    """
    logprobs_C, entropies_C = _TokenLogprobs.apply(logits_CV, target_ids_C, temperature)  # type: ignore[no-untyped-call]
    return logprobs_C, entropies_C


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, target_ids_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        normalizers_C = torch.empty(len(logits_CV), dtype=_precision(logits_CV), device=logits_CV.device)
        entropies_C = torch.empty_like(normalizers_C)
        for rows in _blocks(logits_CV):
            z_RV = _scaled(logits_CV[rows], temperature)
            largest_R = z_RV.amax(-1)
            weights_RV = (z_RV - largest_R[:, None]).exp_()
            sums_R = weights_RV.sum(-1)
            normalizers_C[rows] = largest_R + sums_R.log()
            # A logit of -inf has no weight; 0 x -inf would be NaN.
            terms_RV = weights_RV.mul_(z_RV.clamp(min=torch.finfo(z_RV.dtype).min))
            entropies_C[rows] = normalizers_C[rows] - terms_RV.sum(-1) / sums_R
        targets_C = logits_CV.gather(-1, target_ids_C[:, None])[:, 0].to(normalizers_C.dtype) / temperature
        ctx.save_for_backward(logits_CV, target_ids_C, normalizers_C, entropies_C)
        ctx.temperature, ctx.spent = temperature, False
        ctx.set_materialize_grads(False)
        return targets_C - normalizers_C, entropies_C

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        """With p = softmax(z), z = logits / temperature, H the entropy: d log p_t / dz = [t] - p, dH / dz = -p (log p
        + H)."""
        if ctx.spent:
            raise RuntimeError("the logits were used up by a backward pass before this one")
        ctx.spent = True
        logprob_grads_C, entropy_grads_C = grads
        if logprob_grads_C is None and entropy_grads_C is None:
            return None, None, None
        logits_CV, target_ids_C, normalizers_C, entropies_C = ctx.saved_tensors
        grads_CV = logits_CV  # in place
        for rows in _blocks(logits_CV):
            log_p_RV = _scaled(logits_CV[rows], ctx.temperature).sub_(normalizers_C[rows, None])
            p_RV = log_p_RV.exp()
            if entropy_grads_C is None:
                grad_RV = p_RV.mul_(logprob_grads_C[rows, None] / -ctx.temperature)
            else:
                factor_RV = log_p_RV.clamp_(min=torch.finfo(log_p_RV.dtype).min).add_(entropies_C[rows, None])
                factor_RV *= entropy_grads_C[rows, None]
                if logprob_grads_C is not None:
                    factor_RV += logprob_grads_C[rows, None]
                grad_RV = p_RV.mul_(factor_RV).div_(-ctx.temperature)
            grads_CV[rows] = grad_RV
        if logprob_grads_C is not None:
            # Not into the block: two targets of one row there are none, so this adds to each row once.
            own_C1 = (logprob_grads_C / ctx.temperature).to(grads_CV.dtype)[:, None]
            grads_CV.scatter_add_(-1, target_ids_C[:, None], own_C1)
        return grads_CV, None, None


def _scaled(logits_RV: Tensor, temperature: float) -> Tensor:
    """A copy in the precision that is computed in."""
    precision = _precision(logits_RV)
    return logits_RV.to(precision).div(temperature) if temperature != 1 else logits_RV.to(precision, copy=True)


def _precision(logits_CV: Tensor) -> torch.dtype:
    return torch.promote_types(logits_CV.dtype, torch.float32)


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    block_bytes = _BLOCK_BYTES.get(logits_CV.device.type, _DEFAULT_BLOCK_BYTES)
    step = max(1, block_bytes // (4 * logits_CV.shape[-1]))
    for start in range(0, len(logits_CV), step):
        yield slice(start, start + step)
