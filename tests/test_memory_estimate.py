"""Memory before a run: published numbers, properties of all setups, and what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from raygym.memory_estimate import (
    CONTEXT_BYTES,
    CUDA_GRAPH_BYTES,
    GIB,
    EngineSetup,
    LearnerSetup,
    activation_bytes_per_token,
    estimate_engine,
    estimate_learner,
)
from raygym.model_shape import ModelShape, read_shape

SHAPE = ModelShape(layers=4, hidden=256, heads=8, kv_heads=2, head_size=32, intermediate=512, vocab=1000, tied=False,
                   context=4096)  # fmt: skip
LEARNER = LearnerSetup(SHAPE, ranks=1, zero_stage=0, bytes_per_value=2, tokens_per_micro_batch=128, longest_sequence=64)
SETUPS = st.builds(
    LearnerSetup,
    shape=st.just(SHAPE),
    ranks=st.sampled_from([1, 2, 4, 8]),
    zero_stage=st.integers(0, 3),
    bytes_per_value=st.sampled_from([2, 4]),
    tokens_per_micro_batch=st.sampled_from([64, 512]),
    longest_sequence=st.sampled_from([32, 1024]),
    trained_parameters=st.sampled_from([None, 1000]),
    gradient_checkpointing=st.booleans(),
    offload_optimizer=st.booleans(),
    offload_parameters=st.booleans(),
    reference=st.booleans(),
)
EXACT = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    # Figure 1 of arXiv 1910.02054 with 64 ranks: 120, 31.4, 16.6 and 1.9 GB for 7.5 B parameters.
    [(0, 120 / 7.5), (1, 31.4 / 7.5), (2, 16.6 / 7.5), (3, 1.9 / 7.5)],
)
def test_states_are_those_of_the_zero_paper(stage: int, bytes_per_parameter: float) -> None:
    memory = estimate_learner(replace(LEARNER, ranks=64, zero_stage=stage))
    states = memory.weights + memory.gradients + memory.optimizer
    assert states / SHAPE.parameters == pytest.approx(bytes_per_parameter, rel=0.02)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_rank_loads_the_whole_policy_before_anything_is_shared(stage: int) -> None:
    memory = estimate_learner(replace(LEARNER, ranks=64, zero_stage=stage, offload_parameters=stage == 3))
    assert memory.start == 2 * SHAPE.parameters + CONTEXT_BYTES
    assert memory.start_host == 2 * SHAPE.parameters
    assert memory.peak == max(memory.start, memory.total)
    on_cpu = estimate_learner(replace(LEARNER, ranks=64, zero_stage=stage, gpu=False))
    assert (on_cpu.start, on_cpu.start_host) == (2 * SHAPE.parameters, 0)


def test_adam_in_fp32_without_zero_keeps_no_second_copy_of_the_weights() -> None:
    memory = estimate_learner(replace(LEARNER, bytes_per_value=4))
    assert memory.weights == memory.gradients == 4 * SHAPE.parameters
    assert memory.optimizer == 8 * SHAPE.parameters


def test_adapters_have_gradients_and_moments_and_the_base_has_none() -> None:
    memory = estimate_learner(replace(LEARNER, trained_parameters=1000))
    assert memory.weights == 2 * (SHAPE.parameters + 1000)
    assert (memory.gradients, memory.optimizer) == (2000, 12_000)


def test_offloaded_states_are_on_the_host_instead() -> None:
    here = estimate_learner(replace(LEARNER, zero_stage=2, ranks=2))
    there = estimate_learner(replace(LEARNER, zero_stage=2, ranks=2, offload_optimizer=True))
    assert there.optimizer == there.gradients == 0
    assert there.host == here.optimizer + here.gradients


@EXACT
@given(setup=SETUPS)
def test_a_higher_stage_needs_no_more_for_states(setup: LearnerSetup) -> None:
    if setup.bytes_per_value == 4:
        return  # stages 1 and 2 keep a rank's share of fp32 weights twice
    states = []
    for stage in range(4):
        memory = estimate_learner(replace(setup, zero_stage=stage))
        states.append(memory.weights + memory.gradients + memory.optimizer)
    assert states == sorted(states, reverse=True)


@EXACT
@given(setup=SETUPS)
def test_more_ranks_need_no_more_each(setup: LearnerSetup) -> None:
    one, more = (estimate_learner(replace(setup, ranks=ranks)) for ranks in (2, 16))
    for name in ("weights", "gradients", "optimizer", "activations", "total", "host"):
        assert getattr(more, name) <= getattr(one, name), name


@EXACT
@given(setup=SETUPS)
def test_the_total_is_the_sum_and_nothing_is_negative(setup: LearnerSetup) -> None:
    memory = estimate_learner(setup)
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.kv_cache, memory.buffers]
    assert min(parts) >= 0
    assert memory.total == sum(parts)
    assert setup.zero_stage == 3 or setup.offload_parameters or memory.start <= memory.total


@EXACT
@given(setup=SETUPS)
def test_what_saves_memory_saves_memory(setup: LearnerSetup) -> None:
    base = replace(setup, gradient_checkpointing=False, offload_optimizer=False, offload_parameters=False)
    whole = estimate_learner(base)
    assert estimate_learner(replace(base, gradient_checkpointing=True)).activations <= whole.activations
    assert estimate_learner(replace(base, offload_optimizer=True)).total <= whole.total
    assert estimate_learner(replace(base, offload_parameters=True)).weights <= whole.weights


def kept_per_token(kind: str, layers: int, dtype: torch.dtype, tokens: int = 192) -> tuple[float, ModelShape]:
    """Bytes that autograd keeps for the backward pass of a real model, parameters left out."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96} if kind == "qwen3_moe" else {}
    config = AutoConfig.for_model(
        kind, hidden_size=128, intermediate_size=320, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=64, max_position_embeddings=512, **experts,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.model(torch.arange(tokens)[None] % 64, use_cache=False)
    nbytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert out.last_hidden_state.requires_grad
    return nbytes / tokens, read_shape(config.to_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "tolerance"), [("llama", 0.01), ("qwen2", 0.01), ("qwen3", 0.01), ("qwen3_moe", 0.1)])
def test_activations_are_what_autograd_keeps(kind: str, tolerance: float, dtype: torch.dtype) -> None:
    one, _ = kept_per_token(kind, 1, dtype)
    three, shape = kept_per_token(kind, 3, dtype)
    assert activation_bytes_per_token(shape, dtype.itemsize) == pytest.approx((three - one) / 2, rel=tolerance)


ENGINE = EngineSetup(SHAPE, bytes_per_value=2, max_model_len=4096, max_num_batched_tokens=256, max_num_seqs=16)


def test_the_kv_cache_is_what_the_engine_is_allowed_less_the_rest() -> None:
    memory = estimate_engine(ENGINE, 80 * GIB)
    assert memory.total == int(0.92 * 80 * GIB)
    assert memory.buffers == CONTEXT_BYTES + CUDA_GRAPH_BYTES
    # Keys and values of 4 layers, 2 heads of 32, in bf16.
    assert ENGINE.kv_bytes_per_token == 2 * 4 * 2 * 32 * 2


@pytest.mark.parametrize(("tensor", "share"), [(1, 1.0), (2, 0.5), (4, 0.5)])
def test_tensor_parallel_ranks_share_weights_and_key_heads(tensor: int, share: float) -> None:
    setup = replace(ENGINE, tensor_parallel=tensor)
    assert estimate_engine(setup, 80 * GIB).weights == pytest.approx(2 * SHAPE.parameters / tensor, rel=1e-5)
    assert setup.kv_bytes_per_token == share * ENGINE.kv_bytes_per_token  # two heads: four ranks have one each


def test_an_engine_that_has_no_room_says_so_by_a_negative_cache() -> None:
    assert estimate_engine(ENGINE, GIB).kv_cache < 0


def test_a_cache_that_is_given_is_not_computed() -> None:
    assert estimate_engine(replace(ENGINE, kv_cache_bytes=GIB), 0).kv_cache == GIB
