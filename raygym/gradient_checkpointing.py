"""Gradient checkpointing (arXiv 1604.06174) of a policy in eval mode.

A checkpointed layer keeps its input only and computes itself again in the backward pass: one more forward pass of the
layers for memory that grows with layers x hidden size, instead of with all that a layer computes.
"""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer


def enable_gradient_checkpointing(policy: Any) -> None:
    """Checkpoint every layer of a Hugging Face model. Its logprobs and gradients stay the same, bit for bit.

    Raises:
        ValueError: the model has no layers that can be checkpointed.
    """
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not policy.supports_gradient_checkpointing:
        raise ValueError(
            f"learner.gradient_checkpointing: {policy.config.model_type} has no layers that transformers can "
            f"checkpoint; set it to false, or use another model"
        )
    # Under ZeRO-3 a recomputed layer's parameters are gathered anew; torch's check of what was saved would compare the
    # shapes that they have while partitioned. Re-entrant checkpoints give no gradients where the first layer's input
    # needs none, as with adapters.
    policy.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
    for layer in layers:
        # transformers checkpoints layers in training mode only. The flag is set on the layer by itself: what is inside
        # stays in eval mode, where no dropout is. A layer's own dropout, which some models have, is a number on it.
        layer.training = True
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
