"""A gang that goes on from another one's state, with real DeepSpeed: the same bits, or other ranks and ZeRO stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_learner import assert_updated_alike, config, learners, model_dir, sequences, whole_weights
from tiers import only_long

from raygym.actors import learner_group
from raygym.actors.learner_group import LearnerError
from raygym.full_disk import is_full
from raygym.learner_config import LoraConfig
from raygym.testing.chaos import Fault, Plan
from raygym.types import TrainSequence

__all__ = ["model_dir", "sequences"]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
CLOCKS = {"seconds", "tokens_per_s", "tflops_per_s"}
Where = tuple[int, int]
"""ZeRO stage and ranks."""


@pytest.fixture(scope="module")
def uninterrupted(
    ray_cluster: None, model_dir: Path, sequences: list[TrainSequence], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor], dict[str, float]]:
    """Two steps of one learner in one process: its state between them, and what the second one gave."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with learners(config(), model_dir) as group:
        group.update(sequences)
        group.save_state(str(folder / "state"))
        stats = group.update(sequences)
        return folder / "state", whole_weights(group, folder / "policy"), stats


def test_a_fresh_process_goes_on_with_the_same_bits(
    uninterrupted: tuple[Path, dict[str, torch.Tensor], dict[str, float]],
    model_dir: Path,
    sequences: list[TrainSequence],
    tmp_path: Path,
) -> None:
    state, expected, expected_stats = uninterrupted
    with learners(config(), model_dir) as group:
        group.load_state(str(state))
        stats = group.update(sequences)
        weights = whole_weights(group, tmp_path / "policy")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    unequal = {key for key, value in expected_stats.items() if stats[key] != value}
    assert unequal <= CLOCKS


@pytest.mark.parametrize(
    "way",
    [
        [(0, 1), (3, 2), (0, 1)],
        pytest.param([(0, 1), (1, 2), (2, 2)], marks=only_long),
        pytest.param([(1, 1), (3, 1), (1, 1), (0, 1)], marks=only_long),
        pytest.param([(3, 2), (1, 2), (3, 1), (0, 2)], marks=only_long),
    ],
    ids=lambda way: "-".join(f"zero{stage}x{ranks}" for stage, ranks in way),
)
def test_ranks_and_stages_may_change_at_every_stop(
    way: list[Where],
    ray_cluster: None,
    model_dir: Path,
    sequences: list[TrainSequence],
    tmp_path: Path,
) -> None:
    """One step on each gang; together they do what one learner does that makes as many steps."""
    with learners(config(), model_dir) as group:
        for _ in way:
            group.update(sequences)
        expected = whole_weights(group, tmp_path / "uninterrupted")
    state: Path | None = None
    for number, (stage, ranks) in enumerate(way):
        with learners(config(stage, ranks), model_dir) as group:
            if state is not None:
                group.load_state(str(state))
                # What was loaded, saved again, is the same to the last bit, whatever the gang.
                group.save_state(str(tmp_path / "again"))
                assert files(tmp_path / "again") == files(state)
            stats = group.update(sequences)
            state = tmp_path / f"state-{number}"
            group.save_state(str(state))
            weights = whole_weights(group, tmp_path / f"policy-{number}")
    assert stats["lr"] == pytest.approx(1e-3)
    for name, value in expected.items():
        assert_updated_alike(name, weights[name], value)


def files(state: Path) -> dict[str, bytes]:
    # Random generators are each rank's own, and the index says how many ranks there were.
    from safetensors.torch import load_file

    tensors = {name: t for path in state.glob("*.safetensors") for name, t in load_file(path).items()}
    return {name: t.numpy().tobytes() for name, t in tensors.items() if not name.startswith("random.")}


@only_long  # all of it is in the other tests, but for the copy of the weights in float32
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_keeps_its_float32_weights(
    stage: int, ray_cluster: None, model_dir: Path, sequences: list[TrainSequence], tmp_path: Path
) -> None:
    with learners(config(stage, dtype="bfloat16"), model_dir) as group:
        group.update(sequences)
        group.save_state(str(tmp_path / "state"))
        expected_stats = group.update(sequences)
        expected = whole_weights(group, tmp_path / "policy")
    with learners(config(stage, dtype="bfloat16"), model_dir) as group:
        group.load_state(str(tmp_path / "state"))
        stats = group.update(sequences)
        weights = whole_weights(group, tmp_path / "resumed")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert stats["loss"] == expected_stats["loss"] and stats["grad_norm"] == expected_stats["grad_norm"]


@only_long
@pytest.mark.parametrize(
    ("stage", "offloaded", "ranks", "dtype", "adapters"),
    [
        (0, False, 1, "float32", True),
        (3, False, 2, "bfloat16", True),
        (1, True, 1, "bfloat16", False),
        (2, True, 1, "float32", False),
        (3, True, 2, "bfloat16", False),
    ],
)
def test_adapters_and_offloaded_optimizers_go_on_with_the_same_bits(
    stage: int,
    offloaded: bool,
    ranks: int,
    dtype: str,
    adapters: bool,
    ray_cluster: None,
    model_dir: Path,
    sequences: list[TrainSequence],
    tmp_path: Path,
) -> None:
    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offloaded else {})}
    lora = {"lora": LoraConfig()} if adapters else {}
    chosen = config(stage, ranks, dtype=dtype, deepspeed={"zero_optimization": zero}, **lora)
    with learners(chosen, model_dir) as group:
        group.update(sequences)
        group.save_state(str(tmp_path / "state"))
        expected_stats = group.update(sequences)
        expected = whole_weights(group, tmp_path / "uninterrupted")
    with learners(chosen, model_dir) as group:
        group.load_state(str(tmp_path / "state"))
        stats = group.update(sequences)
        weights = whole_weights(group, tmp_path / "resumed")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert {key for key, value in expected_stats.items() if stats[key] != value} <= CLOCKS


@only_long
def test_a_state_of_another_policy_fails_on_all_ranks_at_once(
    uninterrupted: tuple[Path, dict[str, torch.Tensor], dict[str, float]], model_dir: Path, tmp_path: Path
) -> None:
    with (
        learners(config(0, 2), model_dir) as group,
        pytest.raises(Exception, match=r"learner state in .*nowhere cannot be used"),
    ):
        group.load_state(str(tmp_path / "nowhere"))


def test_a_gang_whose_disk_is_full_goes_on(
    ray_cluster: None,
    model_dir: Path,
    sequences: list[TrainSequence],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 waits for rank 0's files, and must not wait for ever when there are none."""
    full = [Fault(point, "fill_disk", hit=1, hits=1) for point in ("disk.policy", "disk.learner_state")]
    variables = Plan(tuple(full)).environment(tmp_path / "plan.json")
    usual = learner_group.rank_environment
    monkeypatch.setattr(learner_group, "rank_environment", lambda *args: usual(*args) | variables)
    with learners(config(0, 2), model_dir) as group:
        group.update(sequences)
        for save, name in ((group.save_hf, "policy"), (group.save_state, "state")):
            with pytest.raises(LearnerError, match="learner rank 0 of 2 failed") as raised:
                save(str(tmp_path / name))
            assert is_full(raised.value)
            assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(name)]
            save(str(tmp_path / name))
        group.update(sequences)
        group.load_state(str(tmp_path / "state"))
    assert (tmp_path / "policy/config.json").is_file()
