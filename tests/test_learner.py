"""Real DeepSpeed on the tiny policy, compared with plain PyTorch in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from test_packing import make_sequence
from tiers import only_long
from transformers import AutoModelForCausalLM, AutoTokenizer

from raygym.actors.learner_group import LearnerError, LearnerGroup
from raygym.config import LearnerConfig
from raygym.learner_config import LoraConfig
from raygym.lora import add_adapters
from raygym.models import resolve_policy
from raygym.types import TrainSequence

pytestmark = [pytest.mark.ray]

TEMPERATURE = 0.8
LENGTHS = [40, 9, 25, 3, 31, 17, 40, 2, 12, 60, 22, 8]


def config(stage: int = 0, ranks: int = 1, budget: int = 64, **changes: Any) -> LearnerConfig:
    return LearnerConfig(
        num_learners=ranks,
        lr=1e-3,
        warmup_steps=3,
        weight_decay=0.01,
        grad_clip=0.5,
        kl_coef=0.05,
        clip_low=0.2,
        clip_high=0.3,
        mini_batches=2,
        tokens_per_micro_batch=budget,
        threads=1,
        deepspeed={"zero_optimization": {"stage": stage}},
        startup_timeout_s=400,
        update_timeout_s=300,
    ).model_copy(update=changes)


@contextmanager
def learners(learner_config: LearnerConfig, model_dir: Path) -> Iterator[LearnerGroup]:
    group = LearnerGroup.launch(learner_config, str(model_dir), TEMPERATURE)
    try:
        group.wait_ready()
        yield group
    finally:
        group.shutdown()


def load(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def logprobs_of(model: Any, sequence: TrainSequence) -> torch.Tensor:
    ids = torch.tensor(sequence.token_ids, dtype=torch.long)
    logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE, -1)
    return logprobs.gather(-1, ids[1:, None])[:, 0][torch.tensor(sequence.loss_mask[1:])]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve_policy("tiny-tied")


@pytest.fixture(scope="module")
def sequences(model_dir: Path) -> list[TrainSequence]:
    return make_sequences(model_dir)


def make_sequences(model_dir: Path) -> list[TrainSequence]:
    """Twelve sequences whose behaviour logprobs are the policy's own with noise, so that some ratios are clipped."""
    model, rng, made = load(model_dir), np.random.default_rng(5), []
    for seed, length in enumerate(LENGTHS):
        sequence = make_sequence(length, seed)
        with torch.no_grad():
            noise = rng.normal(0, 0.2, int(sequence.loss_mask.sum()))
            sequence.logprobs[sequence.loss_mask] = logprobs_of(model, sequence).numpy() + noise
        made.append(sequence)
    return made


def plain_updates(
    model_dir: Path, sequences: list[TrainSequence], updates: int, lora: LoraConfig | None = None
) -> tuple[Any, list[float], float]:
    """The same algorithm, written plainly: one sequence at a time, one process. Returns also norms and last loss."""
    model, reference, cfg, norms, losses = load(model_dir), load(model_dir), config(), [], []
    if lora is not None:
        add_adapters(model, lora)
    trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    half = len(sequences) // 2
    for update in range(updates):
        part = sequences[:half] if update % 2 == 0 else sequences[half:]
        count = sum(int(s.loss_mask.sum()) for s in part)
        total = torch.zeros(())
        for sequence in part:
            current = logprobs_of(model, sequence)
            with torch.no_grad():
                start = logprobs_of(reference, sequence)
            ratio = (current - torch.tensor(sequence.logprobs[sequence.loss_mask])).exp()
            credit = torch.tensor(sequence.advantages[sequence.loss_mask])
            surrogate = torch.minimum(ratio * credit, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * credit)
            kl = (start - current).exp() - (start - current) - 1
            total = total + (cfg.kl_coef * kl - surrogate).sum()
        optimizer.zero_grad()
        (total / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained_parameters, cfg.grad_clip)))
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (update + 1) / cfg.warmup_steps)
        optimizer.step()
        losses.append(total.item())
    trained = sum(int(s.loss_mask.sum()) for s in sequences)
    return model, norms, sum(losses[-2:]) / trained


def assert_updated_alike(name: str, weights: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5, a hundredth of one update of 1e-3, where fp32 allows to say so.

    Adam divides a gradient by its own size plus 1e-8: where it is about that small, the order of a sum decides by how
    much the weight moves, and processors differ in it. Such weights are rare and still move by nearly the same.
    """
    difference = (weights - expected).abs()
    assert (difference > 1e-5).float().mean() < 1e-4, f"{name}: {(difference > 1e-5).sum()} weights differ"
    assert difference.max() < 1e-4, f"{name}: largest difference {difference.max()}"


def whole_weights(group: LearnerGroup, path: Path) -> dict[str, torch.Tensor]:
    group.save_hf(str(path))
    return dict(load(path).named_parameters())


@pytest.mark.parametrize(
    ("stage", "ranks", "budget"),
    [
        pytest.param(0, 1, 64, marks=only_long),
        (0, 2, 10_000),
        pytest.param(1, 2, 64, marks=only_long),
        pytest.param(2, 2, 64, marks=only_long),
        pytest.param(3, 1, 10_000, marks=only_long),
        (3, 2, 64),
    ],
)
def test_updates_equal_plain_pytorch(
    stage: int,
    ranks: int,
    budget: int,
    ray_cluster: None,
    model_dir: Path,
    sequences: list[TrainSequence],
    tmp_path: Path,
) -> None:
    expected, norms, loss = plain_updates(model_dir, sequences, updates=4)
    with learners(config(stage, ranks, budget), model_dir) as group:
        before = group.token_logprobs(sequences)
        group.update(sequences)
        learned = group.learned_logprobs()
        stats = group.update(sequences)
        starting = group.reference_logprobs(sequences)
        weights = whole_weights(group, tmp_path / "policy")
        specs = group.call_all("weight_specs", timeout_s=60)

    assert set(learned) == set(range(len(sequences)))
    for index in range(len(sequences) // 2):  # of the first mini-batch
        np.testing.assert_allclose(learned[index], before[index], atol=1e-5)
    start = load(model_dir)
    for sequence, logprobs in zip(sequences, before, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(logprobs[sequence.loss_mask], logprobs_of(start, sequence), atol=1e-5)
        assert not logprobs[~sequence.loss_mask].any()
    np.testing.assert_allclose(np.concatenate(starting), np.concatenate(before), atol=1e-5)
    moved = 0.0
    for name, parameter in expected.named_parameters():
        assert_updated_alike(name, weights[name], parameter)
        moved = max(moved, (parameter - start.get_parameter(name)).abs().max().item())
    assert moved > 1e-3, "the updates changed nothing: nothing was compared"
    assert all(spec == [(n, tuple(p.shape)) for n, p in start.named_parameters()] for spec in specs)
    assert stats["grad_norm"] == pytest.approx(sum(norms[2:]) / 2, rel=1e-4)
    assert norms[2] > config().grad_clip, "clipping was not exercised"
    assert stats["loss"] == pytest.approx(loss, abs=1e-5)
    assert stats["lr"] == pytest.approx(1e-3)
    assert stats["clip_fraction"] > 0 and stats["reference_kl"] > 0 and stats["entropy"] > 0
    assert stats["tokens_trained"] == sum(s.loss_mask.sum() for s in sequences)
    assert stats["tokens_total"] == sum(LENGTHS)
    assert 0 <= stats["padding_fraction"] < 0.5


@pytest.fixture(scope="module")
def pair(ray_cluster: None, model_dir: Path) -> Iterator[LearnerGroup]:
    """Two ranks under ZeRO-3 without KL, shared by the tests that do not compare weights after updates."""
    with learners(config(3, 2, kl_coef=0.0, mini_batches=1, weight_decay=0.0), model_dir) as group:
        yield group


def test_first_stats_are_the_difference_to_the_engine(pair: LearnerGroup, sequences: list[TrainSequence]) -> None:
    current = pair.token_logprobs(sequences)
    differences = np.concatenate([(s.logprobs - now)[s.loss_mask] for s, now in zip(sequences, current, strict=True)])
    stats = pair.update(sequences)
    assert stats["logprob_abs_diff"] == pytest.approx(np.abs(differences).mean(), rel=1e-4)
    assert stats["logprob_abs_diff_max"] == pytest.approx(np.abs(differences).max(), rel=1e-4)
    assert stats["kl"] == pytest.approx(differences.mean(), rel=1e-4)
    assert stats["reference_kl"] == 0


def without_signal(sequence: TrainSequence) -> TrainSequence:
    return TrainSequence.uniform(sequence.token_ids, sequence.loss_mask, sequence.logprobs, 0.0)


def untrained(sequence: TrainSequence) -> TrainSequence:
    return TrainSequence.uniform(sequence.token_ids, np.zeros_like(sequence.loss_mask), sequence.logprobs, 1.0)


@pytest.mark.parametrize("change", [without_signal, untrained])
def test_a_batch_without_signal_gives_finite_numbers(
    change: Any, pair: LearnerGroup, sequences: list[TrainSequence]
) -> None:
    stats = pair.update([change(sequence) for sequence in sequences])
    assert np.isfinite(list(stats.values())).all()
    assert stats["loss"] == 0 and stats["grad_norm"] == 0


def test_fewer_sequences_than_ranks_and_none_at_all(pair: LearnerGroup, sequences: list[TrainSequence]) -> None:
    assert pair.update(sequences[:1])["tokens_total"] == LENGTHS[0]
    stats = pair.update([])
    assert np.isfinite(list(stats.values())).all() and stats["tokens_trained"] == 0


def test_saved_directory_is_whole_and_replaces_an_older_one(pair: LearnerGroup, tmp_path: Path) -> None:
    path = tmp_path / "policy"
    path.mkdir()
    (path / "old").touch()
    pair.save_hf(str(path))
    assert not (path / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert (path / "generation_config.json").exists() and list(path.glob("*.safetensors"))
    assert AutoTokenizer.from_pretrained(path).chat_template
    model = load(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_failing_rank_is_named(pair: LearnerGroup, tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match=r"learner rank \d of 2 failed in weight_manifest"):
        pair.call_all("weight_manifest", "not a number of bytes", timeout_s=120)
    process = psutil.Process(pair._processes[1][1])
    process.suspend()
    try:
        # Long enough for the other one to answer on a busy machine, or both would be named.
        with pytest.raises(LearnerError, match=r"rank 1 of 2 did not finish ping within 5 s"):
            pair.call_all("ping", timeout_s=5)
    finally:
        process.resume()
    assert pair.call_all("ping", timeout_s=120) == [0, 1]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=only_long), pytest.param(2, marks=only_long), 3])
def test_bfloat16_follows_float32(
    stage: int, ray_cluster: None, model_dir: Path, sequences: list[TrainSequence]
) -> None:
    # Coarse, but a first step of 0.73 of its size (which DeepSpeed takes by itself at stage 0) is 25 % off.
    _, norms, loss = plain_updates(model_dir, sequences, updates=4)
    with learners(config(stage, 1, dtype="bfloat16"), model_dir) as group:
        group.update(sequences)
        stats = group.update(sequences)
    assert stats["loss"] == pytest.approx(loss, rel=0.1)
    assert stats["grad_norm"] == pytest.approx(sum(norms[2:]) / 2, rel=0.15)


def test_a_missing_policy_is_an_error_that_names_the_rank(ray_cluster: None, tmp_path: Path) -> None:
    group = LearnerGroup.launch(config(), str(tmp_path / "nowhere"), TEMPERATURE)
    try:
        with pytest.raises(LearnerError, match="learner rank 0 of 1 failed in setup"):
            group.wait_ready()
    finally:
        group.shutdown()
