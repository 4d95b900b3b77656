"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: y = W x + (alpha / rank) B A x with W frozen, B = 0 at the start.

They are injected into the Hugging Face model in place, so its class and its methods stay. peft takes seconds to import,
so it is imported where adapters are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raygym.learner_config import LoraConfig
from raygym.packing import MicroBatch
from raygym.policy_weights import ADAPTER


def add_adapters(policy: Any, config: LoraConfig) -> None:
    """Put adapters into the policy and freeze all else. The policy's logprobs are those it had.

    A always starts from the same seed, so ranks and runs start alike.

    Raises:
        ValueError: `target_modules` names no layer, or one whose adapter could not be merged.
    """
    import peft

    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        lora_dropout=config.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            peft.inject_adapter_in_model(options, policy, ADAPTER)
        except ValueError as error:
            raise ValueError(_problem(policy, config, str(error).splitlines()[0])) from error
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A") and not isinstance(module.base_layer, nn.Linear | _conv1d()):
            raise ValueError(_problem(policy, config, f"{name} is a {type(module.base_layer).__name__}"))
    if hasattr(policy.get_output_embeddings(), "lora_A"):
        raise ValueError(_problem(policy, config, "it names the output head, which may share its weight"))
    dtype = next(policy.parameters()).dtype
    # The adapters only: buffers, such as rotary frequencies, are in fp32 and must stay so.
    for parameter in adapter_parameters(policy).values():
        parameter.data = parameter.data.to(dtype)
    policy.eval()


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _problem(policy: Any, config: LoraConfig, problem: str) -> str:
    linear = {name.rpartition(".")[2] for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
    return (
        f"learner.lora.target_modules: {config.target_modules!r} does not fit {policy.config.model_type} ({problem}); "
        f"expected all-linear, or names of linear layers inside it, of {', '.join(sorted(linear - {'lm_head'}))}"
    )


def set_dropout(policy: Any, on: bool) -> None:
    """Switch `lora.dropout`; all other dropout stays off."""
    for name, module in policy.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
            module.train(on)


def without_adapters(model: Any) -> Callable[[MicroBatch, float], tuple[Tensor, Tensor]]:
    """`model` as it was before adapters were added, at the cost of no memory: they count 0 times during a call."""
    from peft.helpers import rescale_adapter_scale

    def starting_policy(batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        with rescale_adapter_scale(model, 0.0):
            logprobs_N, entropies_N = model(batch, temperature)
        return logprobs_N, entropies_N

    return starting_policy


def adapter_parameters(policy: Any) -> dict[str, nn.Parameter]:
    """Name in the model -> parameter, of the adapters only."""
    return {name: parameter for name, parameter in policy.named_parameters() if ".lora_" in name}


def save_adapter(policy: Any, weights: Mapping[str, Tensor], base: str, directory: Path) -> None:
    """Write peft's own files, which `peft.PeftModel.from_pretrained` and engines load beside the base model.

    Args:
        policy: with adapters.
        weights: name in the model -> whole tensor, of all `adapter_parameters`.
        base: the model that the adapters are for.
        directory: is made.
    """
    directory.mkdir(parents=True)
    options = policy.peft_config[ADAPTER]
    options.base_model_name_or_path, options.inference_mode = base, True
    options.save_pretrained(directory)
    renamed = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": weight for name, weight in weights.items()}
    save_file(renamed, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
