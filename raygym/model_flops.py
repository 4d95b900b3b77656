"""Model-FLOPs use: the arithmetic that training a policy needs, and what a GPU can do.

Source: PaLM, arXiv 2204.02311, appendix B: 6N + 12 L H Q T operations for a token of a sequence of T, with N
parameters, L layers, H heads of Q dimensions. Work that is done twice to save memory does not count, nor does padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_TRAINED, _FROZEN = 6, 4
"""Operations a parameter and token: 2 forward, 2 for the gradient of its input, 2 for its own gradient."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

PEAK_TFLOPS: Mapping[str, float] = MappingProxyType(
    {
        "B200": 2250.0,
        "GH200": 989.4,
        "H200 NVL": 835.5,
        "H200": 989.4,
        "H100 NVL": 835.5,
        "H100 PCIe": 756.0,
        "H100": 989.4,
        "H800": 989.4,
        "H20": 148.0,
        "A100": 312.0,
        "A800": 312.0,
        "L40S": 362.0,
        "L40": 181.0,
        "L4": 121.0,
        "A10": 125.0,
    }
)
"""Dense bfloat16 on tensor cores, by NVIDIA's data sheets; longer names before those that they contain."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a forward and a backward pass of one policy cost, in floating-point operations."""

    per_token: float
    """All layers, without attention between tokens."""
    per_trained_token: float
    """The output head: the learner computes it only where a trained token is predicted."""
    per_pair: float
    """Attention, for each of the T x T pairs of a sequence's tokens: as the source counts them, masked or not."""

    @classmethod
    def of(cls, policy: Any) -> ModelFlops:
        """Count the parameters of a Hugging Face causal language model. They must be whole, so before ZeRO cuts them.

        Looking up an input embedding costs nothing. Of a mixture of experts those count that a token meets. Where
        layers attend to a part of the sequence only, it is an upper bound.
        """
        config = policy.config.get_text_config()
        lookup, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
        body = sum(
            _cost(weight) * (_active_experts(config) if ".experts." in name else 1.0)
            for name, weight in policy.named_parameters()
            if weight is not lookup and weight is not head
        )
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(float(body), float(_cost(head)), 12.0 * config.num_hidden_layers * heads * head_size)

    def training(self, tokens: float, trained_tokens: float, pairs: float) -> float:
        """Operations of an update.

        Args:
            tokens: that were computed, without padding.
            trained_tokens: those of them that are in the loss.
            pairs: T x T, summed over the sequences; of what several begin with, counted once.
        """
        return self.per_token * tokens + self.per_trained_token * trained_tokens + self.per_pair * pairs


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by the name that CUDA gives it; None where it is not known or a MIG slice."""
    words = device_name.split()
    if "MIG" in words:
        return None
    for name, tflops in PEAK_TFLOPS.items():
        # Whole words, "A100-SXM4-80GB" being one that begins with its name: an A10 is no A100, an L4 no L40.
        parts = name.split()
        if all(any(word == part or word.startswith(f"{part}-") for word in words) for part in parts):
            return tflops
    return None


def _cost(weight: Any) -> int:
    return int(weight.numel()) * (_TRAINED if weight.requires_grad else _FROZEN)


def _active_experts(config: Any) -> float:
    total = next((count for name in _EXPERTS if (count := getattr(config, name, None))), None)
    return float(config.num_experts_per_tok / total) if total else 1.0
