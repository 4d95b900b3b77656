"""The policy as the learner sees it: log-probabilities of the trained tokens, and nothing else.

Legend: B rows, L tokens a row, N trained tokens, C tokens of one chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raygym.packing import MicroBatch

CHUNK_LOGITS = 2**26
"""Logits (C x V) kept at a time; 256 MiB in fp32."""
# How configs name what is done to logits after the output head's matrix product.
_SOFTCAPS, _FACTORS, _DIVISORS = (
    ("final_logit_softcapping",),
    ("logit_scale", "lm_head_multiplier"),
    ("logits_scaling",),
)


class TokenLogprobs(nn.Module):
    """Wraps a Hugging Face causal language model.

    The output head runs only where a trained token is predicted, in chunks: with more than one, a chunk's logits are
    recomputed in the backward pass, so memory is bounded by `chunk_logits` instead of N x V.
    """

    def __init__(self, policy: Any, chunk_logits: int = CHUNK_LOGITS, *, entropy_gradient: bool = False) -> None:
        super().__init__()
        self._entropy_gradient = entropy_gradient
        self.policy = policy
        self._chunk = max(1, chunk_logits // policy.config.get_text_config().vocab_size)

    def forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities (with gradient) and entropies (if wanted, too) of the N trained tokens, in nats, fp32.

        Both are of the distribution that was sampled from: logits divided by `temperature` (> 0).
        """
        hidden_BLH = self.policy.base_model(
            input_ids=batch.input_ids_BL, position_ids=batch.position_ids_BL, use_cache=False
        ).last_hidden_state
        hidden_NH = hidden_BLH.flatten(0, 1)[batch.positions_N]
        chunks = zip(hidden_NH.split(self._chunk), batch.target_ids_N.split(self._chunk), strict=True)
        if len(hidden_NH) <= self._chunk:
            return self._head(hidden_NH, batch.target_ids_N, temperature)
        parts = [checkpoint(self._head, h, target, temperature, use_reentrant=False) for h, target in chunks]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _head(self, hidden_CH: Tensor, target_ids_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits_CV = self.logits(hidden_CH).float() / temperature
        normalizer_C = logits_CV.logsumexp(-1)
        logprobs_C = logits_CV.gather(-1, target_ids_C[:, None])[:, 0] - normalizer_C
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._entropy_gradient):
            probabilities_CV = (logits_CV - normalizer_C[:, None]).exp()
            entropies_C = normalizer_C - (probabilities_CV * logits_CV).sum(-1)
        return logprobs_C, entropies_C

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """What the model's own forward makes of final hidden states: the head, then its cap or scale if it has one."""
        logits_CV: Tensor = self.policy.get_output_embeddings()(hidden_CH)
        config = self.policy.config.get_text_config()
        for name in _FACTORS:
            if (factor := getattr(config, name, None)) is not None:
                logits_CV = logits_CV * factor
        for name in _DIVISORS:
            if (divisor := getattr(config, name, None)) is not None:
                logits_CV = logits_CV / divisor
        for name in _SOFTCAPS:
            if (cap := getattr(config, name, None)) is not None:
                logits_CV = torch.tanh(logits_CV / cap) * cap
        return logits_CV


@torch.no_grad()
def check_model(model: TokenLogprobs) -> None:
    """Refuse a model whose packed rows would not give the logprobs of its sequences: ten tokens, once, at the start.

    Raises:
        ValueError: sequences of one row see each other, or the model does more to its logits than `logits` knows.
    """
    policy = model.policy
    device = next(policy.parameters()).device
    sequences = [torch.arange(1, 6, device=device), torch.arange(5, 8, device=device)]
    positions = torch.cat([torch.arange(len(ids), device=device) for ids in sequences])[None]
    hidden = policy.base_model(
        input_ids=torch.cat(sequences)[None], position_ids=positions, use_cache=False
    ).last_hidden_state
    packed = model.logits(hidden[0]).float()
    alone = torch.cat([policy(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]).float()
    difference = (packed.log_softmax(-1) - alone.log_softmax(-1)).abs().max().item()
    allowed = 1e-3 if hidden.dtype == torch.float32 else 0.25
    if difference > allowed:
        raise ValueError(
            f"policy.model: {policy.config.model_type} gives other logprobs for sequences packed in one row than for "
            f"each alone (largest difference {difference:.3g}, allowed {allowed}); expected a causal transformer whose "
            f"attention follows position_ids and whose logits are its output head's; use another model"
        )
