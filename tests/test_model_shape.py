"""A policy's size from its config.json: equal to that of the model that Transformers builds from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from raygym.architecture import published_models, read_architecture
from raygym.model_shape import UnknownShape, read_shape
from raygym.models import resolve_policy

# As their authors publish them, to three digits.
PUBLISHED_BILLIONS = {
    "Qwen/Qwen3-4B-Instruct-2507": 4.02,
    "Qwen/Qwen2.5-7B-Instruct": 7.62,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-14B": 14.8,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30.5,
    "Qwen/Qwen2.5-32B-Instruct": 32.8,
    "Qwen/Qwen3-32B": 32.8,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
}


def count(config: dict[str, Any]) -> int:
    """Parameters of the real model, without its memory."""
    kind = config["model_type"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "model_type": kind}))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", published_models())
def test_published_models_have_the_parameters_that_transformers_builds(model: str) -> None:
    architecture = read_architecture(model, None)
    assert architecture is not None
    parameters = read_shape(architecture.config).parameters
    assert parameters == count(architecture.config)
    if model in PUBLISHED_BILLIONS:
        assert float(f"{parameters / 1e9:.3g}") == PUBLISHED_BILLIONS[model]


def test_of_experts_only_some_are_active() -> None:
    architecture = read_architecture("Qwen/Qwen3-30B-A3B", None)
    assert architecture is not None
    shape = read_shape(architecture.config)
    # 3.3 B, as its model card says.
    assert 3.3e9 <= shape.active_parameters < 3.4e9
    assert shape.largest_layer_parameters * shape.layers < shape.parameters


@pytest.mark.parametrize("model", ["tiny", "tiny-tied"])
def test_our_own_policies(model: str) -> None:
    directory = resolve_policy(model)
    real = AutoModelForCausalLM.from_pretrained(directory)
    assert read_shape(json.loads((directory / "config.json").read_text())).parameters == sum(
        parameter.numel() for parameter in real.parameters()
    )


@pytest.mark.vllm  # it takes the real policy
def test_smollm2() -> None:
    directory = resolve_policy("smollm2-135m-instruct")
    real = AutoModelForCausalLM.from_pretrained(directory)
    shape = read_shape(json.loads((directory / "config.json").read_text()))
    assert shape.parameters == sum(parameter.numel() for parameter in real.parameters()) == 134_515_008


@settings(max_examples=15, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]))
def test_any_shape_is_counted_exactly(data: st.DataObject, kind: str) -> None:
    kv_heads, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    layers = data.draw(st.integers(1, 4))
    config = {
        "model_type": kind,
        "hidden_size": 12 * kv_heads * groups,
        "intermediate_size": data.draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": data.draw(st.sampled_from([4, 12])) if kind != "qwen2" else 12,
        "vocab_size": data.draw(st.integers(1, 50)),
        "tie_word_embeddings": data.draw(st.booleans()),
        "max_position_embeddings": 64,
        "attention_bias": data.draw(st.booleans()),
        "mlp_bias": data.draw(st.booleans()),
    }
    if kind == "qwen3_moe":
        config |= {
            "num_experts": data.draw(st.integers(2, 4)),
            "num_experts_per_tok": 2,
            "moe_intermediate_size": data.draw(st.integers(1, 9)),
            "decoder_sparse_step": data.draw(st.integers(1, 2)),
            "mlp_only_layers": data.draw(st.lists(st.integers(0, layers - 1), unique=True)),
        }
    assert read_shape(config).parameters == count(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba"}, ["model_type", "'mamba'", "qwen3"]),
        ({}, ["model_type", "None"]),
        ({"model_type": "llama", "num_attention_heads": 2}, ["num_hidden_layers", "missing"]),
    ],
)
def test_what_cannot_be_counted_is_said(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnknownShape) as caught:
        read_shape(config)
    assert all(word in str(caught.value) for word in words)


def test_a_policy_whose_files_are_here_is_read_from_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    architecture = read_architecture("Qwen/Qwen3-8B", str(tmp_path))
    assert architecture is not None
    assert architecture.config == {"model_type": "llama"}
    assert read_architecture("nobody/knows-this", None) is None
    assert read_architecture("./nowhere", None) is None
