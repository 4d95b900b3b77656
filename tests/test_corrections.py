"""Weights between engine and learner, alone and in the objective, against formulas applied token by token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import make_sequence
from tiers import examples

from raygym.algorithms.corrections import LARGEST_LOG_RATIO, correction_weights
from raygym.algorithms.losses import KL_ESTIMATORS
from raygym.algorithms.objective import loss_divisor, objective
from raygym.algorithms.presets import CORRECTION_BOUNDS
from raygym.config import LearnerConfig
from raygym.method_config import Correction, MethodConfig
from raygym.packing import assign_micro_batches, pack
from raygym.types import TrainSequence

LENGTHS = [12, 3, 9, 1, 20, 7]
LOSSES: list[dict[str, Any]] = [
    {**loss, **mean}
    for loss in ({"loss": "clip"}, {"loss": "clip", "dual_clip": 1.2}, {"loss": "cispo"}, {"loss": "reinforce"})
    for mean in ({"loss_mean": "token"}, {"loss_mean": "sequence"}, {"loss_mean": "constant", "loss_length": 30})
] + [{"loss": "gspo", "loss_mean": "sequence"}]
# Bounds that some of the tokens and sequences below cross, and others do not.
BOUNDS: dict[str, dict[str, float]] = {
    "none": {},
    "truncated_token": {"correction_cap": 1.2},
    "truncated_sequence": {"correction_cap": 1.1},
    "masked": {"correction_cap": 1.4, "correction_low": 0.7},
    "rejected_sequence": {"correction_cap": 1.1, "correction_low": 0.9},
}
ALLOWED = [
    {**loss, "correction": correction, **BOUNDS[correction], "decoupled": decoupled}
    for loss in LOSSES
    for correction in get_args(Correction)
    for decoupled in (True, False)
    # Elsewhere the config refuses it: the weight is in the ratio already.
    if decoupled or correction in ("none", "rejected_sequence") or loss["loss"] == "reinforce"
]


def by_sequence(
    correction: str, log_ratios: np.ndarray, cap: float = math.inf, low: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and which of them are bounded, of the trained tokens of one sequence."""
    ratios = np.exp(np.minimum(log_ratios, LARGEST_LOG_RATIO))
    match correction:
        case "none":
            return ratios, np.zeros(len(ratios), bool)
        case "truncated_token":
            return np.where(ratios < cap, ratios, cap), ratios > cap
        case "truncated_sequence":
            product = math.exp(min(math.fsum(log_ratios), LARGEST_LOG_RATIO))
            return np.full(len(ratios), min(product, cap)), np.full(len(ratios), product > cap)
        case "masked":
            inside = (low <= ratios) & (ratios <= cap)
            return ratios * inside, ~inside
        case "rejected_sequence":
            mean = math.exp(math.fsum(log_ratios) / max(1, len(log_ratios)))
            return np.full(len(ratios), float(low <= mean <= cap)), np.full(len(ratios), not low <= mean <= cap)
    raise AssertionError(correction)


@pytest.mark.parametrize("correction", get_args(Correction))
@given(
    st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.booleans(), st.integers(0, 3)), min_size=4, max_size=24),
    st.floats(1.01, 6),
    st.floats(0.1, 0.99),
)
@settings(deadline=None, max_examples=examples(25, 60))
def test_weights_equal_the_formulas(
    correction: Correction, tokens: list[tuple[float, float, bool, int]], cap: float, low: float
) -> None:
    proximal, behaviour = (torch.tensor([t[i] for t in tokens], dtype=torch.float64) for i in range(2))
    mask, sequence = torch.tensor([t[2] for t in tokens]), torch.tensor([t[3] for t in tokens])
    proximal[~mask] = math.nan
    weights, bounded = correction_weights(correction, proximal, behaviour, mask, sequence, cap, low)
    expected, expected_bounded = np.zeros(len(tokens)), np.zeros(len(tokens), bool)
    for number in range(4):
        own = [i for i, t in enumerate(tokens) if t[2] and t[3] == number]
        log_ratios = np.array([tokens[i][0] - tokens[i][1] for i in own])
        expected[own], expected_bounded[own] = by_sequence(correction, log_ratios, cap, low)
    values = np.exp([log for log in ((proximal - behaviour)[mask]).tolist()])
    sums = [math.exp(min(20, sum(t[0] - t[1] for t in tokens if t[2] and t[3] == n))) for n in range(4)]
    counts = [max(1, sum(t[2] and t[3] == n for t in tokens)) for n in range(4)]
    means = [math.exp(sum(t[0] - t[1] for t in tokens if t[2] and t[3] == n) / counts[n]) for n in range(4)]
    if min(abs(value - bound) for value in [*values, *sums, *means] for bound in (cap, low)) < 1e-9:
        return  # on a bound, rounding decides about the side
    np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-12)
    assert bounded.tolist() == expected_bounded.tolist()


def test_no_weight_overflows_and_none_has_a_gradient() -> None:
    proximal = torch.tensor([-1.0, -1.0], requires_grad=True)
    behaviour, mask = torch.tensor([-500.0, -1.0]), torch.tensor([True, True])
    weights, bounded = correction_weights("none", proximal, behaviour, mask, torch.tensor([0, 1]), math.inf, 0.0)
    assert torch.isfinite(weights).all() and weights[1] == 1 and not weights.requires_grad
    assert not bounded.any()


def test_the_published_bounds_are_the_defaults() -> None:
    assert set(CORRECTION_BOUNDS) == {*get_args(Correction), "auto"}
    for correction, bounds in CORRECTION_BOUNDS.items():
        method = MethodConfig(correction=correction, decoupled=True).resolved()
        if correction != "auto":
            assert (method.correction_cap, method.correction_low) == bounds


class Case:
    """Sequences whose tokens have IDs of their own, so that a packed token can be told, in whatever order it comes."""

    def __init__(self, lengths: list[int]) -> None:
        rng = np.random.default_rng(11)
        self.sequences, start = [], 0
        for seed, length in enumerate(lengths):
            made = make_sequence(length, seed, trained=0.6)
            ids = np.arange(start, start + length, dtype=np.int32)
            credit = np.where(made.loss_mask, rng.normal(0, 1, length), 0).astype(np.float32)
            self.sequences.append(replace(made, token_ids=ids, advantages=credit))
            start += length
        behaviour = np.concatenate([s.logprobs for s in self.sequences]).astype(np.float64)
        self.proximal = behaviour + rng.normal(0, 0.3, start)
        self.current = self.proximal + rng.normal(0, 0.3, start)
        self.reference = self.proximal + rng.normal(0, 0.3, start)
        self.entropies = rng.random(start) * 3


def learned(config: LearnerConfig, case: Case, ranks: int, budget: int) -> tuple[float, np.ndarray, list[float]]:
    """Loss, its gradient by the current logprobs, and what is counted, over all ranks and micro-batches."""
    leaf = torch.tensor(case.current, requires_grad=True)
    proximal, reference, entropies = (torch.tensor(v) for v in (case.proximal, case.reference, case.entropies))
    divisor, loss, counted = max(1.0, loss_divisor(config, case.sequences)), 0.0, np.zeros(4)
    for rank in assign_micro_batches([len(s.token_ids) for s in case.sequences], ranks, budget):
        for indices in rank:
            batch = pack([case.sequences[index] for index in indices])
            batch = replace(batch, advantages_N=batch.advantages_N.double(), behaviour_N=batch.behaviour_N.double())
            at = batch.target_ids_N
            found = objective(
                config,
                batch,
                leaf[at],
                reference[at] if config.kl_in_loss else None,
                proximal_N=proximal[at],
                entropies_N=entropies[at],
            )
            (found.loss / divisor).backward()
            loss += found.loss.item() / divisor
            counted += [float(v) for v in (found.reference_kl, found.clipped, found.corrected, found.correction)]
    assert leaf.grad is not None
    return loss, leaf.grad.numpy(), counted.tolist()


def plain(config: LearnerConfig, case: Case, current: np.ndarray) -> tuple[float, float, float]:
    """The formulas in NumPy, a sequence at a time: loss, bounded weights, sum of weights.

    CISPO's weights are those of `case.current`, since they have no gradient.
    """
    low, high, total, trained, episodes, bounded, weight = 1 - config.clip_low, 1 + config.clip_high, 0.0, 0, 0, 0, 0.0
    for sequence in case.sequences:
        at = sequence.token_ids[sequence.loss_mask]
        if not len(at):
            continue
        behaviour, credit = (v[sequence.loss_mask].astype(float) for v in (sequence.logprobs, sequence.advantages))
        anchor = case.proximal[at] if config.decoupled else behaviour
        weights, outside = np.ones(len(at)), np.zeros(len(at), bool)
        if config.decoupled or config.correction != "none":
            limits = BOUNDS[config.correction]
            weights, outside = by_sequence(
                config.correction,
                case.proximal[at] - behaviour,
                limits.get("correction_cap", math.inf),
                limits.get("correction_low", 0.0),
            )
        ratio = np.exp(current[at] - anchor)
        if config.loss == "gspo":
            ratio = np.full(len(at), np.exp(np.mean(current[at] - anchor)))
        losses = -np.minimum(ratio * credit, np.clip(ratio, low, high) * credit)
        if config.dual_clip is not None:
            losses = np.where(credit < 0, np.minimum(losses, -config.dual_clip * credit), losses)
        if config.loss == "cispo":
            losses = -np.clip(np.exp(case.current[at] - anchor), low, high) * credit * current[at]
        if config.loss == "reinforce":
            losses = -credit * current[at]
        losses = losses * weights - config.entropy_coef * case.entropies[at]
        if config.kl_coef:
            ahead = case.reference[at] - current[at]
            losses = losses + config.kl_coef * (np.exp(ahead) - 1 - ahead)
        trained, episodes = trained + len(at), episodes + 1
        bounded, weight = bounded + int(outside.sum()), weight + weights.sum()
        total += losses.mean() if config.loss_mean == "sequence" else losses.sum()
    divisor = {
        "token": max(1, trained),
        "sequence": max(1, episodes),
        "constant": max(1, episodes) * (config.loss_length or 0),
    }[config.loss_mean]
    return total / divisor, bounded, weight


@pytest.mark.parametrize("method", ALLOWED, ids=lambda method: "-".join(str(value) for value in method.values()))
def test_loss_and_gradient_equal_the_formulas(method: dict[str, Any]) -> None:
    config = LearnerConfig(**method, kl_coef=0.1, entropy_coef=0.05, clip_low=0.1, clip_high=0.15).resolved()
    case = Case(LENGTHS)
    loss, gradient, counted = learned(config, case, ranks=2, budget=24)
    expected, bounded, weight = plain(config, case, case.current)
    assert loss == pytest.approx(expected, rel=1e-9)
    assert counted[2:] == pytest.approx([bounded, weight], rel=1e-9)
    assert (bounded > 0) == (config.correction != "none"), "the bounds were not exercised"
    by_differences, step = [], 1e-6
    for place in range(len(case.current)):
        values = []
        for change in (step, -step):
            moved = case.current.copy()
            moved[place] += change
            values.append(plain(config, case, moved)[0])
        by_differences.append((values[0] - values[1]) / (2 * step))
    np.testing.assert_allclose(gradient, by_differences, rtol=1e-6, atol=1e-8)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(1, 80),
    st.sampled_from(ALLOWED),
)
@settings(deadline=None, max_examples=examples(30, 80))
def test_ranks_micro_batches_and_packing_change_nothing(
    lengths: list[int], ranks: int, budget: int, method: dict[str, Any]
) -> None:
    config, case = LearnerConfig(**method, kl_coef=0.1, entropy_coef=0.05).resolved(), Case(lengths)
    whole = learned(config, case, ranks=1, budget=10_000)
    for other in (learned(config, case, 1, 1), learned(config, case, ranks, budget)):
        assert other[0] == pytest.approx(whole[0], rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(other[1], whole[1], rtol=1e-9, atol=1e-12)
        assert other[2] == pytest.approx(whole[2], rel=1e-9, abs=1e-12)


def test_what_is_masked_still_counts_in_the_mean() -> None:
    """Of two tokens one is masked: the mean is over both, so the other's gradient is the same as without the mask."""
    made = make_sequence(3, 0)
    sequence = TrainSequence.uniform(
        made.token_ids, np.array([False, True, True]), np.array([0, -1, -5], np.float32), advantage=1.0
    )
    config = LearnerConfig(loss="reinforce", correction="masked").resolved()
    batch, logprobs = pack([sequence]), torch.tensor([-1.0, -1.0], requires_grad=True)
    found = objective(config, batch, logprobs, proximal_N=logprobs.detach())
    (found.loss / loss_divisor(config, [sequence])).backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-0.5, 0]
    assert found.corrected == 1


def test_with_the_engines_own_policy_decoupling_and_corrections_change_nothing() -> None:
    case = Case(LENGTHS)
    case.proximal = np.concatenate([s.logprobs for s in case.sequences]).astype(np.float64)
    expected = learned(LearnerConfig().resolved(), case, 1, 1000)
    for correction in get_args(Correction):
        config = LearnerConfig(correction=correction, decoupled=True).resolved()
        loss, gradient, counted = learned(config, case, 1, 1000)
        assert loss == pytest.approx(expected[0], rel=1e-12) and counted == pytest.approx(expected[2])
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-12)


def test_every_kl_estimator_has_a_name_in_the_config() -> None:
    assert set(KL_ESTIMATORS) == set(get_args(MethodConfig.model_fields["kl_estimator"].annotation))
