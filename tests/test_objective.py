"""The whole objective, packed and cut, against its formulas applied to one sequence after another."""

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

from raygym.algorithms.losses import KL_ESTIMATORS
from raygym.algorithms.means import mini_batch_divisor
from raygym.algorithms.objective import loss_divisor, objective
from raygym.config import LearnerConfig
from raygym.method_config import KlEstimator
from raygym.packing import assign_micro_batches, pack
from raygym.types import TrainSequence

LENGTHS = [12, 3, 9, 1, 20, 7]
METHODS: list[dict[str, Any]] = [
    {**loss, **mean}
    for loss in ({"loss": "clip"}, {"loss": "clip", "dual_clip": 1.2}, {"loss": "cispo"}, {"loss": "reinforce"})
    for mean in ({"loss_mean": "token"}, {"loss_mean": "sequence"}, {"loss_mean": "constant", "loss_length": 30})
] + [{"loss": "gspo", "loss_mean": "sequence"}]


def credited(sequence: TrainSequence, advantage: float) -> TrainSequence:
    return TrainSequence.uniform(sequence.token_ids, sequence.loss_mask, sequence.logprobs, advantage)


def make_case(lengths: list[int]) -> tuple[list[TrainSequence], list[np.ndarray], list[np.ndarray]]:
    """Sequences, and for the trained tokens of each the policy's and the starting policy's logprobs."""
    made = [make_sequence(length, seed, trained=0.5) for seed, length in enumerate(lengths)]
    # Both signs, so that every bound is one that some tokens or sequences cross in the direction where it counts.
    sequences = [credited(sequence, (0.7 + 0.1 * i) * (-1) ** (i + 1)) for i, sequence in enumerate(made)]
    rng = np.random.default_rng(7)
    behaviour = [sequence.logprobs[sequence.loss_mask].astype(np.float64) for sequence in sequences]
    current = [logprobs + rng.normal(0, 0.4, len(logprobs)) for logprobs in behaviour]
    return sequences, current, [logprobs + rng.normal(0, 0.4, len(logprobs)) for logprobs in behaviour]


def learned(
    config: LearnerConfig,
    sequences: list[TrainSequence],
    current: list[np.ndarray],
    reference: list[np.ndarray],
    ranks: int,
    budget: int,
) -> tuple[float, np.ndarray, float, int]:
    """What learners do: shares, micro-batches, one sum. Returns loss, its gradient, reference KL and clipped tokens."""
    leaves = [torch.tensor(logprobs, requires_grad=True) for logprobs in current]
    divisor = max(1.0, loss_divisor(config, sequences))
    computed = [i for i, sequence in enumerate(sequences) if config.kl_coef or sequence.has_signal]
    loss, reference_kl, clipped = 0.0, 0.0, 0
    lengths = [len(sequences[index].token_ids) for index in computed]
    for rank in assign_micro_batches(lengths, ranks, budget):
        for indices in rank:
            share = [computed[index] for index in indices]
            batch = pack([sequences[index] for index in share])
            # The same values in float64, so that a product of two of them is not rounded to float32.
            batch = replace(batch, advantages_N=batch.advantages_N.double(), behaviour_N=batch.behaviour_N.double())
            stand_in = [] if batch.mask_N.all() else [torch.zeros(1, dtype=torch.float64, requires_grad=True)]
            logprobs_N = torch.cat([leaves[index] for index in share] + stand_in)
            reference_N = torch.cat([torch.tensor(reference[index]) for index in share] + stand_in).detach()
            part = objective(config, batch, logprobs_N, reference_N if config.kl_coef else None)
            (part.loss / divisor).backward()
            loss += part.loss.item() / divisor
            reference_kl += part.reference_kl.item()
            clipped += int(part.clipped)
    gradient = [np.zeros(len(leaf)) if leaf.grad is None else leaf.grad.numpy() for leaf in leaves]
    return loss, np.concatenate(gradient), reference_kl, clipped


def plain(
    config: LearnerConfig,
    sequences: list[TrainSequence],
    current: list[np.ndarray],
    reference: list[np.ndarray],
    frozen: list[np.ndarray],
) -> float:
    """The formulas in NumPy. CISPO's weights are those of `frozen`, since they have no gradient."""
    low, high, total, trained, episodes = 1 - config.clip_low, 1 + config.clip_high, 0.0, 0, 0
    for sequence, logprobs, start, fixed in zip(sequences, current, reference, frozen, strict=True):
        if not len(logprobs):
            continue
        behaviour = sequence.logprobs[sequence.loss_mask].astype(np.float64)
        credit = float(sequence.advantages[sequence.loss_mask][0])
        ratio = np.exp(logprobs - behaviour)
        if config.loss == "gspo":
            ratio = np.full_like(ratio, np.prod(ratio) ** (1 / len(ratio)))
        losses = -np.minimum(ratio * credit, np.clip(ratio, low, high) * credit)
        if config.dual_clip is not None and credit < 0:
            losses = np.minimum(losses, -config.dual_clip * credit)
        if config.loss == "cispo":
            losses = -np.clip(np.exp(fixed - behaviour), low, high) * credit * logprobs
        if config.loss == "reinforce":
            losses = -credit * logprobs
        if config.kl_coef:
            ahead = start - logprobs
            kl = {"k1": -ahead, "k2": ahead**2 / 2, "k3": np.exp(ahead) - 1 - ahead}[config.kl_estimator]
            losses = losses + config.kl_coef * kl
        trained, episodes = trained + len(losses), episodes + 1
        total += losses.mean() if config.loss_mean == "sequence" else losses.sum()
    return (
        total
        / {
            "token": max(1, trained),
            "sequence": max(1, episodes),
            "constant": max(1, episodes) * (config.loss_length or math.nan),
        }[config.loss_mean]
    )


def differences(config: LearnerConfig, case: tuple[list[TrainSequence], list[np.ndarray], list[np.ndarray]]) -> Any:
    """The gradient of `plain` by central differences."""
    sequences, current, reference = case
    gradient, step = [], 1e-6
    for index, logprobs in enumerate(current):
        for place in range(len(logprobs)):
            values = []
            for change in (step, -step):
                moved = [row.copy() for row in current]
                moved[index][place] += change
                values.append(plain(config, sequences, moved, reference, current))
            gradient.append((values[0] - values[1]) / (2 * step))
    return np.array(gradient)


@pytest.mark.parametrize("kl", [{}, *({"kl_coef": 0.1, "kl_estimator": name} for name in KL_ESTIMATORS)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(str(value) for value in method.values()))
def test_loss_and_gradient_equal_the_formulas(method: dict[str, Any], kl: dict[str, Any]) -> None:
    config = LearnerConfig(**method, **kl, clip_low=0.05, clip_high=0.08).resolved()
    case = make_case(LENGTHS)
    loss, gradient, _, clipped = learned(config, *case, ranks=2, budget=24)
    assert loss == pytest.approx(plain(config, *case, frozen=case[1]), rel=1e-9)
    np.testing.assert_allclose(gradient, differences(config, case), rtol=1e-6, atol=1e-8)
    assert (clipped > 0) == (config.loss != "reinforce"), "the bounds were not exercised"
    if config.dual_clip is not None:
        single = learned(config.model_copy(update={"dual_clip": None}), *case, ranks=2, budget=24)
        assert single[3] < clipped and single[0] > loss, "the second bound was not exercised"


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(1, 80),
    st.sampled_from(METHODS),
    st.sampled_from([0.0, 0.1]),
    st.sets(st.integers(0, 9)),
)
@settings(deadline=None, max_examples=examples(25, 60))
def test_ranks_micro_batches_and_packing_change_nothing(
    lengths: list[int], ranks: int, budget: int, method: dict[str, Any], kl_coef: float, without_signal: set[int]
) -> None:
    config = LearnerConfig(**method, kl_coef=kl_coef).resolved()
    sequences, current, reference = make_case(lengths)
    sequences = [credited(s, 0.0) if i in without_signal else s for i, s in enumerate(sequences)]
    whole = learned(config, sequences, current, reference, ranks=1, budget=10_000)
    alone = learned(config, sequences, current, reference, ranks=1, budget=1)
    cut = learned(config, sequences, current, reference, ranks, budget)
    for other in (alone, cut):
        assert other[0] == pytest.approx(whole[0], rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(other[1], whole[1], rtol=1e-9, atol=1e-12)
        assert other[2] == pytest.approx(whole[2], rel=1e-9, abs=1e-12)
        assert other[3] == whole[3]
    if kl_coef == 0:
        assert whole[0] == pytest.approx(plain(config, sequences, current, reference, current), rel=1e-9, abs=1e-12)


def test_divisors_count_the_whole_mini_batch_and_no_sequence_without_trained_tokens() -> None:
    assert mini_batch_divisor("token", [3, 0, 5], None) == 8
    assert mini_batch_divisor("sequence", [3, 0, 5], None) == 2
    assert mini_batch_divisor("constant", [3, 0, 5], 100) == 200
    assert mini_batch_divisor("sequence", [0, 0], None) == mini_batch_divisor("token", [], None) == 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_batch_without_trained_tokens_gives_a_loss_of_zero_with_a_gradient(method: dict[str, Any]) -> None:
    # With one: under ZeRO-3 every rank runs its backward pass.
    logprobs_N = torch.tensor([-2.0], requires_grad=True)
    config = LearnerConfig(**method, kl_coef=0.1).resolved()
    sums = objective(config, pack([]), logprobs_N, torch.zeros(1))
    sums.loss.backward()
    assert logprobs_N.grad is not None and logprobs_N.grad.tolist() == [0]
    assert [value.item() for value in sums] == [0] * len(sums)


def test_the_config_names_every_kl_estimator() -> None:
    assert set(KL_ESTIMATORS) == set(get_args(KlEstimator))
