"""Checkpointed layers: the same numbers, computed twice, for less memory, with dropout off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_packing import make_sequence
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from raygym.gradient_checkpointing import enable_gradient_checkpointing
from raygym.models import resolve_policy
from raygym.policy_model import TokenLogprobs
from raygym.policy_packing import choose_packing


def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_policy("tiny"), dtype=torch.float32).eval()


def with_own_dropout() -> Any:
    """A model whose layers apply dropout themselves, by their own training flag."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=259, num_attention_heads=2, dropout=0.5, **sizes)).eval()


class Run:
    """One forward and backward pass."""

    def __init__(self, policy: Any, packing: Any) -> None:
        self.saved_bytes, self.layer_calls = 0, 0
        inside = next(module for name, module in policy.named_modules() if name.endswith(("mlp", "fc1")))
        handle = inside.register_forward_pre_hook(self._called)
        own = {parameter.data_ptr() for parameter in policy.parameters()}

        def pack_hook(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                self.saved_bytes += tensor.nbytes
            return tensor

        model = TokenLogprobs(policy)
        batch = choose_packing(model, packing).pack([make_sequence(30, 1), make_sequence(20, 2)])
        self.layer_calls = 0
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            self.logprobs_N, _ = model(batch, 0.7)
        self.calls_forward = self.layer_calls
        self.logprobs_N.sum().backward()
        self.gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        handle.remove()

    def _called(self, *_: Any) -> None:
        self.layer_calls += 1


@pytest.mark.parametrize(("make", "packing"), [(tiny, "rows"), (tiny, "forest"), (with_own_dropout, "auto")])
def test_numbers_are_the_same_and_layers_are_computed_again(make: Any, packing: Any) -> None:
    plain, policy = Run(make(), packing), make()
    enable_gradient_checkpointing(policy)
    checkpointed = Run(policy, packing)
    assert torch.equal(checkpointed.logprobs_N, plain.logprobs_N)
    assert plain.gradients.keys() == checkpointed.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert torch.equal(checkpointed.gradients[name], gradient), name
    assert (plain.calls_forward, plain.layer_calls) == (1, 1)
    assert (checkpointed.calls_forward, checkpointed.layer_calls) == (1, 2)
    assert checkpointed.saved_bytes < plain.saved_bytes / 2


def test_a_model_without_layers_to_checkpoint_is_refused() -> None:
    policy = tiny()
    policy.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"learner\.gradient_checkpointing: llama has no layers"):
        enable_gradient_checkpointing(policy)
