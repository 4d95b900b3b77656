import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from raygym.algorithms.losses import (
    TokenLosses,
    cispo_loss,
    clipped_token_loss,
    dual_clipped_token_loss,
    gspo_loss,
    k1_kl,
    k2_kl,
    k3_kl,
    reinforce_loss,
)

token = st.tuples(
    st.floats(-12, 0),  # logprob
    st.floats(-12, 0),  # behaviour
    st.floats(-4, 4),  # advantage
    st.booleans(),  # mask
)


def test_clipped_loss_gives_the_published_number() -> None:
    logprobs = torch.tensor([0.5, 1.0, 1.5]).log()
    loss, clipped = clipped_token_loss(
        logprobs, torch.zeros(3), torch.tensor([1.0, -1.0, 2.0]), torch.ones(3, dtype=torch.bool), 0.2, 0.2
    )
    assert loss.mean().item() == pytest.approx(-0.6333, abs=1e-4)
    assert clipped.tolist() == [False, False, True]


def test_dual_clip_gives_the_published_number() -> None:
    logprobs, advantages = torch.tensor([0.5, 1.0, 10.0]).log(), torch.tensor([1.0, -1.0, -4.0])
    mask = torch.ones(3, dtype=torch.bool)
    loss, clipped = dual_clipped_token_loss(logprobs, torch.zeros(3), advantages, mask, 0.2, 0.2, bound=3)
    assert loss.mean().item() == pytest.approx(4.1667, abs=1e-4)
    assert clipped.tolist() == [False, False, True]


def test_kl_estimators_give_the_published_numbers() -> None:
    logprobs, reference = torch.full((3,), -1.0), torch.tensor([0.0, -15.0, -30.0])
    np.testing.assert_allclose(k1_kl(logprobs, reference), [-1, 14, 29])
    np.testing.assert_allclose(k2_kl(logprobs, reference), [0.5, 98, 420.5])
    np.testing.assert_allclose(k3_kl(logprobs, reference), [0.7183, 13.0, 28.0], atol=1e-4)


def by_token(
    name: str, logprob: float, behaviour: float, advantage: float, low: float, high: float
) -> tuple[float, bool]:
    """Loss, and whether it is clipped, of one token that counts; `gspo` as if it were a sequence."""
    ratio = math.exp(logprob - behaviour)
    clipped = min(max(ratio, 1 - low), 1 + high)
    surrogate = min(ratio * advantage, clipped * advantage)
    match name:
        case "clip" | "gspo":
            return -surrogate, surrogate != ratio * advantage
        case "dual":
            stopped = max(surrogate, 3 * advantage) if advantage < 0 else surrogate
            return -stopped, stopped != ratio * advantage
        case "cispo":
            return -clipped * advantage * logprob, clipped != ratio
        case "reinforce":
            return -advantage * logprob, False
    raise AssertionError(name)


def token_losses(
    name: str, logprobs: torch.Tensor, behaviour: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    sequence: torch.Tensor, low: float, high: float,
) -> TokenLosses:  # fmt: skip
    match name:
        case "clip":
            return clipped_token_loss(logprobs, behaviour, advantages, mask, low, high)
        case "dual":
            return dual_clipped_token_loss(logprobs, behaviour, advantages, mask, low, high, 3)
        case "gspo":
            return gspo_loss(logprobs, behaviour, advantages, mask, sequence, low, high)
        case "cispo":
            return cispo_loss(logprobs, behaviour, advantages, mask, low, high)
    return reinforce_loss(logprobs, advantages, mask)


@pytest.mark.parametrize("name", ["clip", "dual", "cispo", "reinforce"])
@given(st.lists(token, min_size=1, max_size=20), st.floats(0.05, 1), st.floats(0.05, 0.9))
@settings(deadline=None, max_examples=examples(20, 40))
def test_losses_equal_a_token_by_token_reference(
    name: str, tokens: list[tuple[float, float, float, bool]], low: float, high: float
) -> None:
    logprobs, behaviour, advantages = (torch.tensor([t[i] for t in tokens], dtype=torch.float64) for i in range(3))
    mask, alone = torch.tensor([t[3] for t in tokens]), torch.arange(len(tokens))
    got = token_losses(name, logprobs, behaviour, advantages, mask, alone, low, high)
    expected = [by_token(name, *t[:3], low, high) if t[3] else (0.0, False) for t in tokens]
    np.testing.assert_allclose(got.losses_T, [loss for loss, _ in expected], rtol=1e-9, atol=1e-12)
    # At 20 ulps from a bound numpy's and torch's exp may differ about the side.
    near = [abs(math.exp(t[0] - t[1]) - bound) < 1e-12 for t in tokens for bound in (1 - low, 1 + high, 3.0)]
    if not any(near):
        assert got.clipped_T.tolist() == [clipped for _, clipped in expected]


@given(st.lists(st.tuples(token, st.integers(0, 3)), min_size=4, max_size=20), st.floats(0.05, 1), st.floats(0.05, 0.9))
@settings(deadline=None, max_examples=examples(20, 40))
def test_gspo_has_one_ratio_for_the_tokens_of_a_sequence_wherever_they_lie(
    tokens: list[tuple[tuple[float, float, float, bool], int]], low: float, high: float
) -> None:
    credit = [1.5, -2.0, 0.0, 3.0]
    expected = [0.0] * len(tokens)
    for number in range(4):
        own = [i for i, (t, owner) in enumerate(tokens) if owner == number and t[3]]
        if own:
            log_ratio = math.fsum(tokens[i][0][0] - tokens[i][0][1] for i in own) / len(own)
            for i in own:
                expected[i] = by_token("gspo", log_ratio, 0.0, credit[number], low, high)[0]
    logprobs, behaviour = (torch.tensor([t[i] for t, _ in tokens], dtype=torch.float64) for i in range(2))
    advantages = torch.tensor([credit[owner] for _, owner in tokens], dtype=torch.float64)
    mask, sequence = torch.tensor([t[3] for t, _ in tokens]), torch.tensor([owner for _, owner in tokens])
    got = gspo_loss(logprobs, behaviour, advantages, mask, sequence, low, high)
    np.testing.assert_allclose(got.losses_T, expected, rtol=1e-9, atol=1e-12)
    for number in range(4):
        assert len(set(got.clipped_T[mask & (sequence == number)].tolist())) <= 1


# Ratios stay away from the bounds 0.8, 1.3 and 3, where losses have kinks; so do the means of the two sequences.
RATIOS = torch.tensor([0.5, 0.7, 0.95, 1.05, 1.2, 1.6, 4.5, 1.0], dtype=torch.float64)
BEHAVIOUR = -torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
CREDIT = torch.tensor([1, -1, 2, -2, 0.5, -0.5, -1, -3], dtype=torch.float64)
MASK = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1])
SEQUENCE = torch.tensor([3, 3, 5, 5, 5, 3, 5, 5])


@pytest.mark.parametrize("name", ["clip", "dual", "gspo", "reinforce"])
@pytest.mark.parametrize("estimator", [k1_kl, k2_kl, k3_kl])
def test_gradient_equals_finite_differences(
    name: str, estimator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    logprobs = (BEHAVIOUR + RATIOS.log()).requires_grad_()

    def total(values: torch.Tensor) -> torch.Tensor:
        losses, _ = token_losses(name, values, BEHAVIOUR, CREDIT, MASK, SEQUENCE, 0.2, 0.3)
        return (losses + 0.1 * estimator(values, BEHAVIOUR - 0.3) * MASK).sum()

    assert torch.autograd.gradcheck(total, (logprobs,), eps=1e-6, atol=1e-8)
    total(logprobs).backward()
    assert logprobs.grad is not None and logprobs.grad[4] == 0, "an untrained token has a gradient"
    assert logprobs.grad.count_nonzero() > 3, "nothing was compared"


def test_cispo_has_the_gradient_of_logprobs_weighted_by_a_constant() -> None:
    logprobs = (BEHAVIOUR + RATIOS.log()).requires_grad_()
    losses, clipped = cispo_loss(logprobs, BEHAVIOUR, CREDIT, MASK, 0.2, 0.3)
    losses.sum().backward()
    assert logprobs.grad is not None
    weights = np.array([0.8, 0.8, 0.95, 1.05, 0, 1.3, 1.3, 1.0])  # the bounds hold, and no token is without gradient
    np.testing.assert_allclose(logprobs.grad, -weights * CREDIT.numpy(), rtol=1e-12)
    assert clipped.tolist() == [True, True, False, False, False, True, True, False]


@pytest.mark.parametrize("name", ["clip", "dual", "gspo", "cispo", "reinforce"])
def test_what_is_masked_may_be_nan_or_overflow(name: str) -> None:
    logprobs = torch.tensor([-1.0, math.nan, 0.0], requires_grad=True)
    behaviour, mask = torch.tensor([-1.0, -1.0, -9999.0]), torch.tensor([True, False, False])
    advantages, together = torch.tensor([2.0, math.nan, 1.0]), torch.zeros(3, dtype=torch.int64)
    losses, clipped = token_losses(name, logprobs, behaviour, advantages, mask, together, 0.2, 0.2)
    losses.sum().backward()
    assert losses.tolist() == [2 if name in ("cispo", "reinforce") else -2, 0, 0]
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-2, 0, 0]
    assert not clipped.any()
