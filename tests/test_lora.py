"""Adapters in the policy: what they add, what engines get, what is exported. peft is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_packing import make_sequence
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from raygym.learner_config import LoraConfig
from raygym.lora import adapter_parameters, add_adapters, save_adapter, set_dropout, without_adapters
from raygym.models import resolve_policy
from raygym.packing import pack
from raygym.policy_model import TokenLogprobs
from raygym.policy_packing import choose_packing
from raygym.policy_weights import policy_weights

CONFIG = LoraConfig(rank=4, alpha=6)
BATCH = pack([make_sequence(30, 1), make_sequence(20, 2)])


def load(model: str = "tiny-tied", dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_policy(model), dtype=dtype).eval()


def trained(policy: Any, config: LoraConfig = CONFIG) -> Any:
    """With adapters that are not where they started."""
    add_adapters(policy, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(policy).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return policy


def logprobs(policy: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = TokenLogprobs(policy)(BATCH, 0.7)[0]
    return found


def merged(policy: Any, model: str = "tiny-tied") -> Any:
    """A plain model with the weights that engines would get."""
    plain, weights = load(model, policy.dtype), policy_weights(policy)
    assert list(weights) == [name for name, _ in plain.named_parameters()], "names and order are the base model's"
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            assert weights[name].shape == tuple(parameter.shape)
            parameter.copy_(weights[name].merged())
    return plain


def test_new_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    policy = load()
    kind = type(policy)
    add_adapters(policy, CONFIG)
    assert type(policy) is kind and not policy.training
    assert torch.equal(logprobs(policy), logprobs(load()))
    assert choose_packing(TokenLogprobs(policy), "rows").name == "rows"
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert names == set(adapter_parameters(policy)) and len(names) == 2 * 7 * 2, "A and B of 7 layers in 2 blocks"
    again = load()
    add_adapters(again, CONFIG)
    for name, parameter in adapter_parameters(again).items():
        assert torch.equal(parameter, adapter_parameters(policy)[name]), "ranks and runs start alike"


@pytest.mark.parametrize("model", ["tiny", "tiny-tied"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_merged_weights_give_the_policys_logprobs(model: str, targets: Any) -> None:
    policy = trained(load(model), CONFIG.model_copy(update={"target_modules": targets}))
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    plain = merged(policy, model)
    assert (logprobs(policy) - logprobs(load(model))).abs().max() > 0.01, "the adapters do something"
    torch.testing.assert_close(logprobs(plain), logprobs(policy), atol=1e-5, rtol=0)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]), "merging leaves the policy alone"


def test_merged_weights_are_pefts_own() -> None:
    policy = trained(load())
    weights = policy_weights(policy)
    layers = [(name, module) for name, module in policy.named_modules() if hasattr(module, "lora_A")]
    assert layers
    for name, module in layers:
        expected = module.base_layer.weight + module.get_delta_weight("default")
        torch.testing.assert_close(weights[f"{name}.weight"].merged(), expected, atol=1e-6, rtol=0)


def test_bfloat16_weights_are_summed_up_in_float32() -> None:
    policy = trained(load(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    weight = policy_weights(policy)["model.layers.0.mlp.up_proj.weight"]
    assert weight.added is not None
    exact = weight.own.double() + 1.5 * weight.added.b_OR.double() @ weight.added.a_RI.double()
    assert torch.equal(weight.merged(), exact.float().to(torch.bfloat16))


def test_rotary_frequencies_stay_in_float32_beside_adapters_in_bfloat16() -> None:
    policy = load(dtype=torch.bfloat16)
    before = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    add_adapters(policy, CONFIG)
    assert before and {name for name, _ in policy.named_buffers()} == before.keys()
    for name, buffer in policy.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}


def test_gpt2_keeps_its_weights_the_other_way_around() -> None:
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2)).eval()
    trained(policy)
    weight = policy_weights(policy)["transformer.h.0.attn.c_attn.weight"]
    assert weight.added is not None and weight.shape == (32, 96)
    module = policy.get_submodule("transformer.h.0.attn.c_attn")
    expected = module.base_layer.weight + module.get_delta_weight("default")
    torch.testing.assert_close(weight.merged(), expected, atol=1e-6, rtol=0)
    assert "transformer.h.0.attn.c_attn.bias" in policy_weights(policy)


def test_the_starting_policy_is_the_one_without_adapters() -> None:
    policy = trained(load())
    model = TokenLogprobs(policy)
    after = logprobs(policy)
    with torch.no_grad():
        start_N, _ = without_adapters(model)(BATCH, 0.7)
    assert torch.equal(start_N, logprobs(load()))
    assert torch.equal(logprobs(policy), after), "and it has them again"
    assert all(parameter.requires_grad for parameter in adapter_parameters(policy).values())


def test_dropout_is_on_in_updates_only() -> None:
    policy = trained(load(), CONFIG.model_copy(update={"dropout": 0.5}))
    exact = logprobs(policy)
    assert torch.equal(exact, logprobs(policy))
    set_dropout(policy, True)
    assert not torch.equal(logprobs(policy), exact)
    set_dropout(policy, False)
    assert torch.equal(exact, logprobs(policy))


def test_the_adapter_is_saved_as_peft_loads_it(tmp_path: Path) -> None:
    policy, base = trained(load()), resolve_policy("tiny-tied")
    save_adapter(
        policy, {n: p.detach() for n, p in adapter_parameters(policy).items()}, str(base), tmp_path / "adapter"
    )
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logprobs(loaded.get_base_model()), logprobs(policy))
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_projj"], ["q_projj", "down_proj, gate_proj"]),
        (["lm_head"], ["output head"]),
        (["embed_tokens"], ["embed_tokens", "Embedding"]),
    ],
)
def test_layers_that_cannot_have_one_are_refused(targets: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"learner\.lora\.target_modules") as caught:
        add_adapters(load("tiny"), CONFIG.model_copy(update={"target_modules": targets}))
    assert all(word in str(caught.value) for word in words), caught.value
