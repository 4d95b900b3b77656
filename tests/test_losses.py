import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.algorithms.losses import clipped_token_loss, dual_clipped_token_loss, k1_kl, k2_kl, k3_kl

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
    assert loss.item() / 3 == pytest.approx(-0.6333, abs=1e-4)
    assert clipped.item() == 1


def test_dual_clip_gives_the_published_number() -> None:
    logprobs, advantages = torch.tensor([0.5, 1.0, 10.0]).log(), torch.tensor([1.0, -1.0, -4.0])
    mask = torch.ones(3, dtype=torch.bool)
    loss = dual_clipped_token_loss(logprobs, torch.zeros(3), advantages, mask, 0.2, 0.2, bound=3)
    assert loss.item() / 3 == pytest.approx(4.1667, abs=1e-4)


def test_kl_estimators_give_the_published_numbers() -> None:
    logprobs, reference = torch.full((3,), -1.0), torch.tensor([0.0, -15.0, -30.0])
    np.testing.assert_allclose(k1_kl(logprobs, reference), [-1, 14, 29])
    np.testing.assert_allclose(k2_kl(logprobs, reference), [0.5, 98, 420.5])
    np.testing.assert_allclose(k3_kl(logprobs, reference), [0.7183, 13.0, 28.0], atol=1e-4)


@given(st.lists(token, min_size=1, max_size=20), st.floats(0.05, 0.5), st.floats(0.05, 0.9))
@settings(deadline=None)
def test_clipped_loss_equals_a_token_by_token_reference(
    tokens: list[tuple[float, float, float, bool]], low: float, high: float
) -> None:
    expected, count = 0.0, 0
    for logprob, behaviour, advantage, counts in tokens:
        ratio = math.exp(logprob - behaviour)
        clipped = min(max(ratio, 1 - low), 1 + high)
        if counts:
            expected -= min(ratio * advantage, clipped * advantage)
            count += clipped * advantage < ratio * advantage
    logprobs, behaviour_T, advantages = (torch.tensor([t[i] for t in tokens], dtype=torch.float64) for i in range(3))
    mask = torch.tensor([t[3] for t in tokens])
    loss, clip_count = clipped_token_loss(logprobs, behaviour_T, advantages, mask, low, high)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert clip_count.item() == count


def test_gradient_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    # Ratios stay away from the bounds 0.8 and 1.3, where the loss has a kink.
    ratios = torch.tensor([0.5, 0.7, 0.95, 1.05, 1.2, 1.6, 2.5, 1.0], dtype=torch.float64)
    behaviour = -torch.rand(8, generator=generator, dtype=torch.float64) * 3
    advantages = torch.tensor([1, -1, 2, -2, 0.5, -0.5, 1, -3], dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1])
    logprobs = (behaviour + ratios.log()).requires_grad_()
    reference = behaviour - 0.3

    def total(values: torch.Tensor) -> torch.Tensor:
        loss, _ = clipped_token_loss(values, behaviour, advantages, mask, 0.2, 0.3)
        return loss + 0.1 * (k3_kl(values, reference) * mask).sum()

    assert torch.autograd.gradcheck(total, (logprobs,), eps=1e-6, atol=1e-8)
    total(logprobs).backward()
    assert logprobs.grad is not None and logprobs.grad[4] == 0, "an untrained token has a gradient"


def test_what_is_masked_may_be_nan_or_overflow() -> None:
    logprobs = torch.tensor([-1.0, math.nan, 0.0], requires_grad=True)
    behaviour, mask = torch.tensor([-1.0, -1.0, -9999.0]), torch.tensor([True, False, False])
    loss, _ = clipped_token_loss(logprobs, behaviour, torch.tensor([2.0, math.nan, 1.0]), mask, 0.2, 0.2)
    loss.backward()
    assert loss.item() == -2
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-2, 0, 0]
