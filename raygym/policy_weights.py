"""The policy's weights under the names that its Hugging Face files and the engines have, adapters or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"
"""peft's name of the one adapter that a policy has; a part of its parameters' names."""
_OWN, _A, _B = ".base_layer", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one weight: `scale` B A. Legend: O outputs, I inputs, R rank."""

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scale: float
    transposed: bool
    """The weight is I x O, as GPT-2 has it."""


@dataclass(frozen=True, slots=True)
class PolicyWeight:
    """One weight as engines have it."""

    own: nn.Parameter
    """The policy's own; frozen where there is an adapter anywhere in the policy."""
    added: LowRank | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What has to be whole when `merged` is called: under ZeRO-3 it is not."""
        return [self.own] if self.added is None else [self.own, self.added.a_RI, self.added.b_OR]

    @property
    def shape(self) -> tuple[int, ...]:
        """Whole, also where DeepSpeed has partitioned the parameter and keeps its shape aside."""
        return tuple(getattr(self.own, "ds_shape", self.own.shape))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with its adapter in it, in its own dtype, summed up in fp32.

        Without an adapter it is the live weight itself, not a copy.
        """
        if self.added is None:
            return self.own.detach()
        delta_OI = self.added.b_OR.float() @ self.added.a_RI.float()
        delta = delta_OI.T if self.added.transposed else delta_OI
        return torch.add(self.own.float(), delta, alpha=self.added.scale).to(self.own.dtype)


def policy_weights(policy: Any) -> dict[str, PolicyWeight]:
    """Hugging Face name -> weight, in the model's order; a tied tensor once, under its first name."""
    parameters = dict(policy.named_parameters())
    weights: dict[str, PolicyWeight] = {}
    for name, parameter in parameters.items():
        if name.endswith((_A, _B)):
            continue
        layer, own, kind = name.rpartition(_OWN)
        if own:
            added = _low_rank(policy, layer, parameters) if kind == ".weight" else None
            weights[layer + kind] = PolicyWeight(parameter, added)
        else:
            weights[name] = PolicyWeight(parameter)
    return weights


def _low_rank(policy: Any, layer: str, parameters: dict[str, nn.Parameter]) -> LowRank:
    module = policy.get_submodule(layer)
    return LowRank(parameters[layer + _A], parameters[layer + _B], module.scaling[ADAPTER], module.fan_in_fan_out)
