"""Rotary frequencies that the longest sequence of a micro-batch chooses: refused where a sequence can be so long."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_config import MINIMAL
from transformers import AutoConfig, AutoModelForCausalLM

from raygym.config import ConfigError
from raygym.config_file import parse_config
from raygym.models import resolve_policy
from raygym.preflight import check_inputs, check_what_is_here
from raygym.rope_scaling import check_rope_scaling

FACTORS = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
LONGROPE = {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS}}
PHI3 = {"rope_scaling": {"type": "su", **FACTORS}, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}
LAYERS = {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": {
    "rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS}}}  # fmt: skip
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}


def architecture(rope: dict[str, Any], most: int = 256) -> dict[str, Any]:
    return {"model_type": "llama", "max_position_embeddings": most, **rope}


@pytest.mark.parametrize(
    ("rope", "most", "longest", "reached"),
    [
        (LONGROPE, 256, 65, 65),
        (LONGROPE, 256, 64, None),
        (LONGROPE, 256, None, 256),
        (PHI3, 256, 65, 65),
        (PHI3, 256, None, None),  # vLLM then takes the original length
        (LAYERS, 256, 200, 200),
        ({"text_config": architecture(LONGROPE)}, 256, 65, 65),
        (DYNAMIC, 64, 65, 65),
        (DYNAMIC, 64, 64, None),
        (DYNAMIC, 64, None, 256),
        (YARN, 256, 256, None),
        ({}, 256, 4096, None),
        ({"rope_scaling": None}, 256, None, None),
    ],
)
def test_what_is_refused(rope: dict[str, Any], most: int, longest: int | None, reached: int | None) -> None:
    if reached is None:
        check_rope_scaling(architecture(rope, most), longest, "policy.vllm.max_model_len")
        return
    with pytest.raises(ConfigError) as caught:
        check_rope_scaling(architecture(rope, most), longest, "policy.vllm.max_model_len")
    for word in (f"policy.vllm.max_model_len: sequences may have {reached} tokens", "rope_type", "expected at most 64"):
        assert word in str(caught.value)


@pytest.mark.parametrize(("rope", "most"), [(LONGROPE, 256), (DYNAMIC, 64)])
def test_a_longer_neighbour_changes_a_sequence_beyond_that_length_only(rope: dict[str, Any], most: int) -> None:
    """Why: two sequences in one row, told apart by their positions, as packed rows are."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=most, initializer_range=0.3, **rope,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()

    @torch.no_grad()
    def first(neighbour: int) -> torch.Tensor:
        lengths = [12, neighbour]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        tokens = torch.arange(sum(lengths))[None] % 31
        hidden: torch.Tensor = model.model(tokens, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[0, :12]

    assert torch.allclose(first(64), first(20), atol=1e-6)
    assert not torch.allclose(first(65), first(20), atol=1e-3)


def test_it_is_told_before_a_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path / "cache"))
    policy = tmp_path / "policy"
    shutil.copytree(resolve_policy("tiny"), policy)
    described = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps({**described, **LONGROPE}))
    long = parse_config({**MINIMAL, "policy": {"model": str(policy), "vllm": {"max_model_len": 65}}})
    for check in (check_inputs, check_what_is_here):
        with pytest.raises(ConfigError, match=r"policy\.vllm\.max_model_len: sequences may have 65"):
            check(long)
    assert check_inputs(long, learns=False).model_dir == str(policy), "it can be served"
    simulated = {"model": str(policy), "engine": "simulated", "simulated": {"max_model_len": 65}}
    with pytest.raises(ConfigError, match=r"policy\.simulated\.max_model_len"):
        check_inputs(parse_config({**MINIMAL, "policy": simulated}))
    assert check_inputs(parse_config({**MINIMAL, "policy": {**simulated, "simulated": {"max_model_len": 64}}}))
