"""What DeepSpeed and peft add to the learner: adapters, offloading, checkpointed layers, fp32 master weights.

Compared with plain PyTorch, as in test_learner, on ZeRO stages that really partition: DeepSpeed by default keeps
parameters as small as the tiny policy's whole.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from test_learner import (
    assert_updated_alike,
    config,
    learners,
    load,
    logprobs_of,
    make_sequences,
    plain_updates,
    whole_weights,
)
from tiers import only_long

from raygym.actors.deepspeed_state import deepspeed_state
from raygym.errors import LearnerStateError
from raygym.learner_config import LoraConfig
from raygym.models import resolve_policy
from raygym.policy_weights import policy_weights
from raygym.types import TrainSequence
from raygym.weights import check_shapes, checkpoint_shapes, tied_names

pytestmark = [pytest.mark.ray]

LORA = LoraConfig(rank=4, alpha=8)


def zero(stage: int, **options: Any) -> dict[str, Any]:
    partition = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **partition, **options}}


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve_policy("tiny-tied")


@pytest.fixture(scope="module")
def sequences(model_dir: Path) -> list[TrainSequence]:
    return make_sequences(model_dir)


def assert_logprobs(model: Any, found: list[Any], sequences: list[TrainSequence]) -> None:
    for sequence, logprobs in zip(sequences, found, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(logprobs[sequence.loss_mask], logprobs_of(model, sequence), atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "ranks", "checkpointed"),
    [
        pytest.param(0, 1, False, marks=only_long),
        pytest.param(0, 2, True, marks=only_long),
        pytest.param(1, 2, False, marks=only_long),
        pytest.param(2, 2, False, marks=only_long),
        pytest.param(3, 1, False, marks=only_long),
        (3, 2, True),
    ],
)
def test_adapters_are_trained_merged_and_exported(
    stage: int,
    ranks: int,
    checkpointed: bool,
    ray_cluster: None,
    model_dir: Path,
    sequences: list[TrainSequence],
    tmp_path: Path,
) -> None:
    expected, norms, loss = plain_updates(model_dir, sequences, updates=4, lora=LORA)
    cfg = config(stage, ranks, lora=LORA, gradient_checkpointing=checkpointed, deepspeed=zero(stage))
    with learners(cfg, model_dir) as group:
        group.update(sequences)
        stats = group.update(sequences)
        weights = whole_weights(group, tmp_path / "policy")
        after = group.token_logprobs(sequences)
        manifests = group.call_all("weight_manifest", 2**16, timeout_s=60)
        fewer_than_ranks = group.update(sequences[:1])

    start = load(model_dir)
    moved = 0.0
    for name, weight in policy_weights(expected).items():
        assert_updated_alike(name, weights[name], weight.merged())
        moved = max(moved, (weights[name] - start.get_parameter(name)).abs().max().item())
    assert moved > 1e-3, "the updates changed nothing: nothing was compared"
    assert torch.equal(weights["model.embed_tokens.weight"], start.model.embed_tokens.weight), "it has no adapter"
    assert stats["grad_norm"] == pytest.approx(sum(norms[2:]) / 2, rel=1e-4)
    assert stats["loss"] == pytest.approx(loss, abs=1e-5)
    assert stats["reference_kl"] > 0, "the KL is to the policy without adapters"
    assert np.isfinite(list(fewer_than_ranks.values())).all()

    for manifest in manifests:
        sent = {tensor.name: tensor.shape for tensor in manifest.tensors}
        check_shapes(sent, checkpoint_shapes(model_dir), tied_names(model_dir))
    assert_logprobs(load(tmp_path / "policy"), after, sequences)
    adapted = peft.PeftModel.from_pretrained(load(model_dir), tmp_path / "policy" / "adapter").eval()
    assert_logprobs(adapted, after, sequences)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=only_long), pytest.param(3, marks=only_long)])
def test_checkpointed_layers_change_no_update(
    stage: int, ray_cluster: None, model_dir: Path, sequences: list[TrainSequence], tmp_path: Path
) -> None:
    expected, norms, _ = plain_updates(model_dir, sequences, updates=2)
    cfg = config(stage, 2, gradient_checkpointing=True, deepspeed=zero(stage))
    with learners(cfg, model_dir) as group:
        stats = group.update(sequences)
        weights = whole_weights(group, tmp_path / "policy")
    for name, parameter in expected.named_parameters():
        assert_updated_alike(name, weights[name], parameter)
    assert stats["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)


OFFLOADS = {
    "optimizer-1": zero(1, offload_optimizer={"device": "cpu"}),
    "optimizer-2": zero(2, offload_optimizer={"device": "cpu"}),
    "optimizer-3": zero(3, offload_optimizer={"device": "cpu"}),
    "both": zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
    "nvme": zero(3, offload_optimizer={"device": "nvme"}, offload_param={"device": "nvme"}),
}
# DeepSpeed compiles its op against them; CPATH is how a compiler is told of headers elsewhere.
LIBAIO = [Path(folder) / "libaio.h" for folder in (*os.environ.get("CPATH", "").split(os.pathsep), "/usr/include")]


@only_long
@pytest.mark.timeout(600)  # DeepSpeed's CPU Adam is compiled where it never was
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_states_change_no_update(
    name: str, ray_cluster: None, model_dir: Path, sequences: list[TrainSequence], tmp_path: Path
) -> None:
    options = copy.deepcopy(OFFLOADS[name])
    if name == "nvme":
        if not any(header.is_file() for header in LIBAIO):
            pytest.skip("needs the headers of libaio")
        for section in ("offload_optimizer", "offload_param"):
            options["zero_optimization"][section]["nvme_path"] = str(tmp_path)
    expected, norms, _ = plain_updates(model_dir, sequences, updates=4)
    cfg = config(ranks=2, deepspeed=options, startup_timeout_s=500)
    with learners(cfg, model_dir) as group:
        group.update(sequences)
        stats = group.update(sequences)
        weights = whole_weights(group, tmp_path / "policy")
    for parameter_name, parameter in expected.named_parameters():
        assert_updated_alike(parameter_name, weights[parameter_name], parameter)
    assert stats["grad_norm"] == pytest.approx(sum(norms[2:]) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=only_long), pytest.param(1, marks=only_long), 2, pytest.param(3, marks=only_long)]
)
def test_bfloat16_has_master_weights_in_float32(
    stage: int, ray_cluster: None, model_dir: Path, sequences: list[TrainSequence], tmp_path: Path
) -> None:
    """Ten updates, each below half of the distance between neighbours in bfloat16: only their sum is seen there."""
    lr, updates = 1e-4, 10
    cfg = config(
        stage, 1, dtype="bfloat16", deepspeed=zero(stage), lr=lr, warmup_steps=0, weight_decay=0.0, kl_coef=0.0,
        mini_batches=1, loss="reinforce",
    )  # fmt: skip
    with learners(cfg, model_dir) as group:
        for _ in range(updates):
            stats = group.update(sequences)
        group.save_hf(str(tmp_path / "policy"))
    assert np.isfinite(stats["grad_norm"]) and stats["grad_norm"] > 0
    weights, start = load_file(tmp_path / "policy" / "model.safetensors"), load(model_dir)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    moved = count = 0
    for name, weight in weights.items():
        before = start.get_parameter(name).detach().bfloat16()
        # From 1/16 on, neighbours are at least 2^-11 apart, and Adam moves by about lr at most.
        coarse = before.abs() >= 1 / 16
        moved += int((weight != before)[coarse].sum())
        count += int(coarse.sum())
        assert (weight.float() - before.float()).abs().max() <= updates * lr * 1.5 + 2.0**-8
    assert lr * 1.5 < 2.0**-12
    assert moved > 0.3 * count, f"{moved} of {count} weights moved: updates were rounded away one by one"


def test_a_state_on_nvme_is_refused_as_one_that_no_gang_can_load() -> None:
    """Otherwise each gang that is started for it would be lost by it."""
    policy = SimpleNamespace(named_parameters=lambda: [])
    engine = SimpleNamespace(module=SimpleNamespace(policy=policy), optimizer=SimpleNamespace(swap_optimizer=True))
    with pytest.raises(LearnerStateError, match=r"offload_optimizer\.device: cpu"):
        deepspeed_state(engine, ModuleType("accessors"), 3).begin_write(1)
