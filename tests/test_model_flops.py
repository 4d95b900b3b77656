"""Model FLOPs against PyTorch's own counter, and what is known of GPUs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from raygym.model_flops import PEAK_TFLOPS, ModelFlops, known_peak_tflops

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("tied", [False, True])
def test_formula_equals_what_pytorch_counts(tied: bool) -> None:
    config = LlamaConfig(**SIZES, intermediate_size=48, num_hidden_layers=3, tie_word_embeddings=tied)
    policy = LlamaForCausalLM._from_config(config, attn_implementation="eager").float()
    rows, length = 2, 24
    ids = torch.arange(rows * length).view(rows, length) % 97
    with FlopCounterMode(display=False) as counter:
        policy(input_ids=ids).logits.sum().backward()
    flops = ModelFlops.of(policy)
    expected = flops.training(ids.numel(), ids.numel(), rows * length**2)
    # The formula counts the norms' weights like matrices.
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)
    body = flops.training(ids.numel(), 0, 0)
    assert expected - body == 6 * 97 * 32 * ids.numel() + 12 * 3 * 4 * 8 * rows * length**2


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    config = LlamaConfig(**SIZES, intermediate_size=48, num_hidden_layers=1)
    policy = LlamaForCausalLM(config)
    whole = ModelFlops.of(policy)
    policy.requires_grad_(False)
    assert ModelFlops.of(policy).per_token == pytest.approx(whole.per_token * 4 / 6)


def test_of_experts_those_count_that_a_token_meets() -> None:
    def per_token(experts: int, met: int) -> float:
        config = MixtralConfig(
            **SIZES, intermediate_size=48, num_hidden_layers=1, num_local_experts=experts, num_experts_per_tok=met
        )
        return ModelFlops.of(MixtralForCausalLM(config)).per_token

    expert, router = 6 * 3 * 32 * 48, 6 * 32
    assert per_token(4, 2) - per_token(4, 1) == pytest.approx(expert)
    assert per_token(8, 2) - per_token(4, 2) == pytest.approx(4 * router)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", PEAK_TFLOPS["H100"]),
        ("NVIDIA H100 PCIe", PEAK_TFLOPS["H100 PCIe"]),
        ("NVIDIA H200", PEAK_TFLOPS["H200"]),
        ("NVIDIA GH200 480GB", PEAK_TFLOPS["GH200"]),
        ("NVIDIA A100-SXM4-80GB", PEAK_TFLOPS["A100"]),
        ("NVIDIA A10", PEAK_TFLOPS["A10"]),
        ("NVIDIA L40S", PEAK_TFLOPS["L40S"]),
        ("NVIDIA L4", PEAK_TFLOPS["L4"]),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 2080", None),
        ("NVIDIA A10G", None),
    ],
)
def test_peaks_by_the_name_that_cuda_gives(name: str, tflops: float | None) -> None:
    assert known_peak_tflops(name) == tflops
