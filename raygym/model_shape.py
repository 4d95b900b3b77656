"""How large a policy is, told from its config.json alone: no weights, no model hub, no torch.

Counts are exact for the dense transformers of Llama's kind and for Qwen3's mixture of experts; `test_model_shape`
compares them with the models that Transformers builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_QK_NORM = ("qwen3", "qwen3_moe")
_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


class UnknownShape(ValueError):
    """A config.json whose parameters cannot be counted; the text says why."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A causal transformer: L layers of attention and a gated MLP, each behind an RMSNorm."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    """Width of the MLP; of a dense layer where there are experts."""
    vocab: int
    tied: bool
    """The output head is the embedding."""
    context: int
    """`max_position_embeddings`, in tokens."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Of attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """An RMSNorm of each head of queries and keys."""
    experts: int = 0
    """In each layer that is not dense; 0 for a dense model."""
    experts_per_token: int = 0
    expert_intermediate: int = 0
    dense_layers: int = 0
    """Of a model with experts: the layers that have none."""

    @property
    def query_size(self) -> int:
        """Numbers in a token's queries, all heads together."""
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Numbers in a token's keys, all heads together; its values have as many."""
        return self.kv_heads * self.head_size

    @property
    def parameters(self) -> int:
        """All of them, a tied tensor once."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Those that one token is computed with: of the experts only `experts_per_token`."""
        return self._parameters(self.experts_per_token)

    @property
    def matrix_parameters(self) -> int:
        """Active parameters that a token is multiplied with: without the lookup in an untied embedding."""
        return self.active_parameters - (0 if self.tied else self.vocab * self.hidden)

    @property
    def largest_layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        dense = not self.experts or self.dense_layers == self.layers
        return self._attention + (self._dense_mlp if dense else self._expert_mlp(self.experts))

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache keeps of a token, over all layers."""
        return 2 * self.layers * self.kv_size

    def lora_parameters(self, rank: int) -> int:
        """Of adapters at each projection of attention and of a dense MLP, `rank` x (inputs + outputs) each."""
        projections = [(self.hidden, self.query_size), (self.query_size, self.hidden)]
        projections += [(self.hidden, self.kv_size)] * 2
        mlp = [(self.hidden, self.intermediate)] * 3
        dense = self.dense_layers if self.experts else self.layers
        return rank * (self.layers * sum(map(sum, projections)) + dense * sum(map(sum, mlp)))

    def _parameters(self, experts: int) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        dense = self.dense_layers if self.experts else self.layers
        mlps = dense * self._dense_mlp + (self.layers - dense) * self._expert_mlp(experts)
        return embeddings + self.layers * self._attention + mlps + self.hidden

    @property
    def _attention(self) -> int:
        """With the two norms of its layer."""
        matrices = self.hidden * (2 * self.query_size + 2 * self.kv_size)
        biases = self.qkv_bias * (self.query_size + 2 * self.kv_size) + self.output_bias * self.hidden
        return matrices + biases + self.qk_norm * 2 * self.head_size + 2 * self.hidden

    @property
    def _dense_mlp(self) -> int:
        return 3 * self.hidden * self.intermediate + self.mlp_bias * (2 * self.intermediate + self.hidden)

    def _expert_mlp(self, experts: int) -> int:
        """With the router, which scores all experts whatever the number that is used."""
        return experts * 3 * self.hidden * self.expert_intermediate + self.hidden * self.experts


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that a Hugging Face config.json describes.

    Raises:
        UnknownShape: its `model_type` is not one whose parameters are counted here, or a key is missing.
    """
    kind = config.get("model_type")
    if kind not in _KNOWN:
        raise UnknownShape(f"config.json: model_type {kind!r} is not counted; expected one of {', '.join(_KNOWN)}")
    try:
        return _shape(str(kind), config)
    except KeyError as error:
        raise UnknownShape(
            f"config.json: {error.args[0]} is missing; expected a config of model_type {kind}"
        ) from error


def _shape(kind: str, config: Mapping[str, Any]) -> ModelShape:
    heads, layers, attention_bias = config["num_attention_heads"], config["num_hidden_layers"], "attention_bias"
    # Transformers 5 writes this key under a name of its own; published configs have the older one.
    experts = (config.get("num_local_experts") or config["num_experts"]) if kind == "qwen3_moe" else 0
    sparse = [
        layer
        for layer in range(layers if experts else 0)
        if layer not in (config.get("mlp_only_layers") or ())
        and (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    ]
    return ModelShape(
        layers=layers,
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        context=config["max_position_embeddings"],
        # Qwen2 has these biases whatever its config says, and Mistral never has.
        qkv_bias=kind == "qwen2" or (kind != "mistral" and bool(config.get(attention_bias))),
        output_bias=kind not in ("qwen2", "mistral") and bool(config.get(attention_bias)),
        mlp_bias=kind == "llama" and bool(config.get("mlp_bias")),
        qk_norm=kind in _QK_NORM,
        experts=experts,
        experts_per_token=config["num_experts_per_tok"] if experts else 0,
        expert_intermediate=config["moe_intermediate_size"] if experts else 0,
        dense_layers=layers - len(sparse) if experts else 0,
    )
