"""The policy as the learner sees it: log-probabilities of the trained tokens, and nothing else.

Legend: B rows, L tokens a row, N trained tokens, C tokens of one chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raygym.logit_chunk import CHUNK_LOGITS
from raygym.packing import MicroBatch
from raygym.token_logprobs import token_logprobs

# How configs name what is done to logits after the output head's matrix product.
_SOFTCAPS, _FACTORS, _DIVISORS = (
    ("final_logit_softcapping",),
    ("logit_scale", "lm_head_multiplier"),
    ("logits_scaling",),
)


class TokenLogprobs(nn.Module):
    """Wraps a Hugging Face causal language model.

    The output head runs only where a trained token is predicted, in chunks: with more than one, a chunk's logits are
    recomputed in the backward pass, so memory is bounded by `chunk_logits` instead of N x V. How many chunks there are
    must be the same on all ranks (`MicroBatch.most_trained`): under ZeRO-3 each use of the head is a collective.
    """

    def __init__(self, policy: Any, chunk_logits: int = CHUNK_LOGITS) -> None:
        super().__init__()
        self.policy = policy
        self._chunk = max(1, chunk_logits // policy.config.get_text_config().vocab_size)

    def forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the N trained tokens, in nats, fp32, with gradient.

        Both are of the distribution that was sampled from: logits divided by `temperature` (> 0).
        """
        layout = {} if batch.forest is None else {"forest": batch.forest}
        hidden_BLH = self.policy.base_model(
            input_ids=batch.input_ids_BL, position_ids=batch.position_ids_BL, use_cache=False, **layout
        ).last_hidden_state
        hidden_NH = hidden_BLH.flatten(0, 1)[batch.positions_N]
        number = math.ceil(max(len(hidden_NH), batch.most_trained) / self._chunk)
        if number == 1:
            return self._head(hidden_NH, batch.target_ids_N, temperature)
        # Some may be empty.
        chunks = zip(hidden_NH.tensor_split(number), batch.target_ids_N.tensor_split(number), strict=True)
        parts = [checkpoint(self._head, h, target, temperature, use_reentrant=False) for h, target in chunks]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _head(self, hidden_CH: Tensor, target_ids_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return token_logprobs(self.logits(hidden_CH), target_ids_C, temperature)

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """What the model's own forward makes of final hidden states: the head, then its cap or scale if it has one.

        No operation here needs its result in the backward pass: `token_logprobs` overwrites it.
        """
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
