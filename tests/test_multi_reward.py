"""GDPO against its formula, and what it is for."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from raygym.algorithms.advantages import group_normalized
from raygym.algorithms.multi_reward import decoupled_normalized, weighted_reward

NAMES = ["right", "format", "short"]
# Multiples of a quarter: what differs does so by more than rounding.
reward = st.integers(-8, 8).map(lambda n: n / 4)
episode = st.dictionaries(st.sampled_from(NAMES), reward)
weights = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 0.5, 2.0]))


def published(groups: list[list[dict[str, float]]], weights: dict[str, float]) -> list[list[float]]:
    sums: list[list[float]] = []
    for group in groups:
        total = [0.0] * len(group)
        for name in NAMES:
            values = [components.get(name, 0.0) for components in group]
            mean = math.fsum(values) / len(values)
            deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
            for i, value in enumerate(values):
                total[i] += weights.get(name, 1.0) * (value - mean) / (deviation + 1e-6)
        sums.append(total)
    everything = [a for group in sums for a in group]
    mean = math.fsum(everything) / len(everything)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in everything) / len(everything))
    return [[(a - mean) / (deviation + 1e-6) for a in group] for group in sums]


@given(st.lists(st.lists(episode, min_size=2, max_size=6), min_size=1, max_size=4), weights)
@settings(max_examples=examples(40, 100), deadline=None)
def test_it_equals_the_formula(groups: list[list[dict[str, float]]], weights: dict[str, float]) -> None:
    got = decoupled_normalized(groups, weights)
    for found, expected in zip(got, published(groups, weights), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_it_tells_apart_what_the_sum_of_rewards_does_not() -> None:
    """The paper's example: one group has 0 0 and 1 0, another 0 0 and 1 1; GRPO gives both pairs the same."""
    one = [{"right": 0.0, "format": 0.0}, {"right": 1.0, "format": 0.0}]
    both = [{"right": 0.0, "format": 0.0}, {"right": 1.0, "format": 1.0}]
    grpo = [group_normalized([weighted_reward(components, {}) for components in group]) for group in (one, both)]
    np.testing.assert_allclose(grpo[0], grpo[1], rtol=1e-5)
    first, second = decoupled_normalized([one, both], {})
    np.testing.assert_allclose(second, 2 * first, rtol=1e-4)


def test_a_group_of_equal_rewards_gets_exactly_zero() -> None:
    equal, _ = decoupled_normalized([[{"a": 0.1, "b": 0.7}] * 3, [{"a": 0.0}, {"a": 1.0}]], {})
    assert equal.tolist() == [0, 0, 0]
    assert decoupled_normalized([], {}) == []


def test_weights_of_a_sum() -> None:
    assert weighted_reward({"right": 1.0, "short": -0.5}, {"short": 2.0}) == 0.0
