"""Statistics of updates against plain formulas, however the batch is cut; and updates that must not be made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from table_engine import TableEngine
from test_packing import make_sequence
from torch import Tensor

from raygym.algorithms.objective import objective
from raygym.config import LearnerConfig
from raygym.model_flops import ModelFlops
from raygym.policy_packing import FOREST, ROWS, Packing
from raygym.types import TrainSequence
from raygym.update import PolicyUpdate
from raygym.update_statistics import UpdateStatistics

torch.set_num_threads(1)
FLOPS = ModelFlops(per_token=5e6, per_trained_token=3e6, per_pair=2e4)


@contextmanager
def gang(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Tensor]]]:
    """A stand-in for `all_reduce`: what a rank sends is kept, and joined to what those sent that went before."""
    sent: list[list[Tensor]] = [[]]

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        number = len(sent[-1])
        sent[-1].append(tensor.clone())
        others = torch.stack([rank[number] for rank in sent])
        tensor.copy_(others.amax(0) if op == dist.ReduceOp.MAX else others.sum(0))

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        yield sent


def counted(
    config: LearnerConfig,
    sequences: list[TrainSequence],
    current: list[np.ndarray],
    entropies: list[np.ndarray],
    packing: Packing,
    ranks: int,
    budget: int,
) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch, gang(patch) as sent:
        for rank, micro_batches in enumerate(packing.assign(sequences, ranks, budget)):
            statistics = UpdateStatistics(torch.device("cpu"))
            for indices in micro_batches:
                batch = packing.pack([sequences[index] for index in indices])
                stand_in = [] if batch.mask_N.all() else [np.full(1, -1e4)]
                logprobs_N = torch.tensor(np.concatenate([*(current[index] for index in indices), *stand_in]))
                entropies_N = torch.tensor(np.concatenate([*(entropies[index] for index in indices), *stand_in]))
                parts = objective(config, batch, logprobs_N)
                statistics.add(batch, logprobs_N, entropies_N, parts, first=True)
            # The last rank has what all sent.
            stats = statistics.reduced(ranks, seconds=0.5 + rank, flops=FLOPS, peak_flops=1e12)
            sent.append([])
    return stats


def plain(
    config: LearnerConfig, sequences: list[TrainSequence], current: list[np.ndarray], entropies: list[np.ndarray]
) -> dict[str, float]:
    behaviour = [sequence.logprobs[sequence.loss_mask].astype(np.float64) for sequence in sequences]
    log_ratios = [now - then for now, then in zip(current, behaviour, strict=True)]
    log_ratio, n = np.concatenate(log_ratios), sum(map(len, log_ratios))
    # What the bounds are for: one ratio a token, or a sequence.
    bounded = [np.full_like(row, row.mean()) if config.loss == "gspo" and len(row) else row for row in log_ratios]
    ratio = np.exp(np.concatenate(bounded))
    credit = np.concatenate([s.advantages[s.loss_mask] for s in sequences])
    if config.loss == "cispo":
        high, low = ratio > 1 + config.clip_high, ratio < 1 - config.clip_low
    else:
        high, low = (credit > 0) & (ratio > 1 + config.clip_high), (credit < 0) & (ratio < 1 - config.clip_low)
        if config.dual_clip is not None:
            high |= (credit < 0) & (ratio > config.dual_clip)
    ratio = np.exp(log_ratio)
    lengths = np.array([len(sequence.token_ids) for sequence in sequences])
    return {
        "kl": -log_ratio.sum() / max(n, 1),
        "kl_k3": (ratio - 1 - log_ratio).sum() / max(n, 1),
        "entropy": np.concatenate(entropies).sum() / max(n, 1),
        "clip_fraction": (high | low).sum() / max(n, 1),
        "clip_fraction_high": high.sum() / max(n, 1),
        "clip_fraction_low": low.sum() / max(n, 1),
        "ratio_mean": ratio.mean() if n else 1,
        "ratio_min": ratio.min() if n else 1,
        "ratio_max": ratio.max() if n else 1,
        "ratio_ess": ratio.sum() ** 2 / (n * (ratio**2).sum()) if n else 1,
        "log_ratio_std": log_ratio.std() if n else 0,
        "logprob_abs_diff": np.abs(log_ratio).sum() / max(n, 1),
        "logprob_abs_diff_max": np.abs(log_ratio).max(initial=0),
        "tokens_trained": n,
        "tokens_total": lengths.sum(),
    }


METHODS: list[dict[str, Any]] = [
    {"loss": "clip"},
    {"loss": "clip", "dual_clip": 1.2},
    {"loss": "cispo"},
    {"loss": "reinforce"},
    {"loss": "gspo", "loss_mean": "sequence"},
]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 100),
    st.sampled_from([ROWS, FOREST]),
    st.sampled_from(METHODS[:3] + METHODS[4:]),
)
@settings(deadline=None, max_examples=60)
def test_statistics_equal_plain_formulas_however_the_batch_is_cut(
    lengths: list[int], ranks: int, budget: int, packing: Packing, method: dict[str, Any]
) -> None:
    config, rng = LearnerConfig(**method, clip_low=0.1, clip_high=0.15).resolved(), np.random.default_rng(len(lengths))
    sequences = [make_sequence(length, seed, trained=0.5) for seed, length in enumerate(lengths)]
    counts = [int(sequence.loss_mask.sum()) for sequence in sequences]
    current = [s.logprobs[s.loss_mask] + rng.normal(0, 0.3, n) for s, n in zip(sequences, counts, strict=True)]
    entropies = [rng.random(n) for n in counts]
    stats = counted(config, sequences, current, entropies, packing, ranks, budget)
    for name, value in plain(config, sequences, current, entropies).items():
        assert stats[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    # Random sequences have nothing in common, so all is computed.
    operations = 5e6 * sum(lengths) + 3e6 * sum(counts) + 2e4 * sum(length**2 for length in lengths)
    assert stats["shared_fraction"] == 0
    assert stats["seconds"] == ranks - 0.5, "the slowest rank's"
    assert stats["tflops_per_s"] == pytest.approx(operations / stats["seconds"] / 1e12)
    assert stats["mfu"] == pytest.approx(stats["tflops_per_s"] / ranks)
    assert stats["tokens_per_s"] == pytest.approx(sum(lengths) / stats["seconds"])


def test_reinforce_has_no_bound() -> None:
    sequences = [make_sequence(30, 0)]
    far = [sequences[0].logprobs[sequences[0].loss_mask].astype(np.float64) + 3]
    stats = counted(LearnerConfig(**METHODS[3]).resolved(), sequences, far, far, ROWS, 1, 100)
    assert stats["clip_fraction"] == stats["clip_fraction_high"] == stats["clip_fraction_low"] == 0
    assert stats["ratio_mean"] == pytest.approx(math.exp(3))


def test_what_sequences_share_is_computed_once_and_costs_so() -> None:
    first = make_sequence(40, 0)
    ids = first.token_ids.copy()
    ids[30:] = 7  # no token of `make_sequence` is below 3; those from 30 on differ
    ids[30] = 1
    sequences = [first, replace(first, token_ids=ids)]
    current = [sequence.logprobs[sequence.loss_mask].astype(np.float64) for sequence in sequences]
    config = LearnerConfig().resolved()
    plainly = counted(config, sequences, current, current, ROWS, 1, 1000)
    shared = counted(config, sequences, current, current, FOREST, 1, 1000)
    assert shared["shared_fraction"] == 30 / 80 and plainly["shared_fraction"] == 0
    saved = (plainly["tflops_per_s"] - shared["tflops_per_s"]) * 1e12 * shared["seconds"]
    assert saved == pytest.approx(30 * FLOPS.per_token + 30 * 30 * FLOPS.per_pair)
    for name in ("kl", "ratio_ess", "tokens_total", "tokens_per_s"):
        assert shared[name] == plainly[name]


def made(engine: TableEngine, **changes: Any) -> list[TrainSequence]:
    """Sequences whose behaviour logprobs are the engine's own."""
    sequences = [make_sequence(20, seed) for seed in range(4)]
    update = PolicyUpdate(LearnerConfig(), engine, 1.0)
    return [
        replace(sequence, logprobs=update.token_logprobs([sequence])[0].astype(np.float32), **changes)
        for sequence in sequences
    ]


def test_an_update_tells_its_statistics() -> None:
    engine = TableEngine()
    config = LearnerConfig(lr=0.5, mini_batches=2, warmup_steps=4)
    update = PolicyUpdate(config, engine, 1.0)
    stats = update.run(made(engine))
    assert stats["logprob_abs_diff_max"] < 1e-6, "the first mini-batch is on-policy"
    assert stats["lr"] == 0.25 and update.updates == engine.steps == stats["updates"] == 2
    assert stats["grad_norm"] > 0 and "mfu" not in stats and "tflops_per_s" not in stats
    assert update.run(made(engine))["ratio_ess"] <= 1


def with_advantage(sequence: TrainSequence, advantage: float) -> TrainSequence:
    return replace(sequence, advantages=np.where(sequence.loss_mask, advantage, 0).astype(np.float32))


@pytest.mark.parametrize("how", ["a weight", "an advantage"])
def test_a_loss_that_is_not_finite_makes_no_update(how: str) -> None:
    engine = TableEngine()
    update = PolicyUpdate(LearnerConfig(lr=0.5, mini_batches=2), engine, 1.0)
    sequences = made(engine)
    if how == "a weight":
        engine.table_VV.data[:] = math.nan
    else:
        sequences[0] = with_advantage(sequences[0], math.inf)
    before = engine.table_VV.detach().clone()
    stats = update.run(sequences)
    assert not math.isfinite(stats["loss"]) and math.isnan(stats["grad_norm"])
    assert update.updates == engine.steps == 0
    assert torch.equal(engine.table_VV.detach(), before) or how == "a weight"


def test_a_gradient_that_is_not_finite_ends_the_updates() -> None:
    class Broken(TableEngine):
        def backward(self, loss: Tensor, *, last: bool) -> None:
            super().backward(loss, last=last)
            assert self.table_VV.grad is not None
            if self.steps == 1:
                self.table_VV.grad[0, 0] = math.inf

    engine = Broken()
    update = PolicyUpdate(LearnerConfig(lr=0.5, mini_batches=4), engine, 1.0)
    stats = update.run(made(engine))
    assert math.isinf(stats["grad_norm"]) and math.isfinite(stats["loss"])
    assert update.updates == engine.steps == stats["updates"] == 1, "the second is refused, the third is not tried"
    assert engine.table_VV.isfinite().all()


def test_a_rank_whose_loss_is_finite_refuses_what_another_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = TableEngine(), TableEngine()
    sequences = made(engines[0])
    sequences[0] = with_advantage(sequences[0], math.nan)
    with gang(monkeypatch) as sent:
        for rank, engine in enumerate(engines):  # rank 0 has the bad one, as rows are dealt out longest first
            PolicyUpdate(LearnerConfig(lr=0.5), engine, 1.0, rank=rank, world_size=2).run(sequences)
            sent.append([])
    assert [engine.steps for engine in engines] == [0, 0]
    assert sorted(float(rank[0]) for rank in sent[:2]) == [0, 1], "one rank's loss was finite"
