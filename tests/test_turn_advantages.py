"""Advantages of turns, against the formula written for one turn at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.algorithms.advantages import ADVANTAGES, group_normalized
from raygym.algorithms.turn_advantages import turn_advantages, turn_returns

episodes = st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=2, max_size=5)
steps = st.lists(episodes, min_size=1, max_size=4)


@given(st.lists(st.floats(-5, 5), max_size=6), st.floats(0, 1))
def test_returns_are_discounted_sums_of_what_comes_after(rewards: list[float], gamma: float) -> None:
    expected = [sum(gamma ** (j - k) * r for j, r in enumerate(rewards) if j >= k) for k in range(len(rewards))]
    np.testing.assert_allclose(turn_returns(rewards, gamma), expected, atol=1e-12)


@given(steps, st.sampled_from([1.0, 0.5, 0.0]))
@settings(max_examples=60, deadline=None)
def test_each_turn_is_compared_with_the_same_turn_of_its_group(groups: list[list[list[float]]], gamma: float) -> None:
    got = turn_advantages("grpo", groups, gamma)
    assert [[len(a) for a in group] for group in got] == [[len(r) for r in group] for group in groups]
    for group, found in zip(groups, got, strict=True):
        for episode, rewards in enumerate(group):
            for turn in range(len(rewards)):
                others = [
                    sum(gamma ** (j - turn) * r for j, r in enumerate(other) if j >= turn)
                    for other in group
                    if len(other) > turn
                ]
                own = sum(gamma ** (j - turn) * r for j, r in enumerate(rewards) if j >= turn)
                expected = 0.0
                if len(others) > 1:
                    expected = (own - np.mean(others)) / (np.std(others, ddof=1) + 1e-6)
                # Returns that differ by rounding only are what the method itself divides by epsilon.
                assert found[episode][turn] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_episodes_of_one_turn_get_what_whole_episodes_get(name: str) -> None:
    groups = [[1.0, 0.0, 0.5], [2.0, 4.0]]
    by_turn = turn_advantages(name, [[[reward] for reward in group] for group in groups], gamma=1.0)
    for found, expected in zip(by_turn, ADVANTAGES[name](groups), strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"reinforce_pp"}))
def test_a_turn_that_no_other_episode_has_reached_gets_nothing(name: str) -> None:
    (short, long), other = turn_advantages(name, [[[1.0], [0.0, 3.0]], [[0.0], [1.0]]], gamma=1.0)
    assert long[1] == 0 and short[0] < 0 < long[0]
    assert other[0][0] < 0 < other[1][0]


def test_an_early_good_turn_is_not_blamed_for_a_late_bad_one() -> None:
    """With gamma 0 each turn answers for its own reward."""
    ((good_then_bad, bad_then_good),) = turn_advantages("grpo", [[[1.0, 0.0], [0.0, 1.0]]], gamma=0.0)
    np.testing.assert_allclose(good_then_bad, group_normalized([1.0, 0.0]))
    np.testing.assert_allclose(bad_then_good, group_normalized([0.0, 1.0]))


def test_plain_reinforce_pp_compares_all_turns_of_the_step() -> None:
    returns = np.array([3.0, 2.0, 1.0, 0.0])
    ((first, second),) = turn_advantages("reinforce_pp", [[[1.0, 2.0], [1.0, 0.0]]], gamma=1.0)
    expected = (returns - returns.mean()) / (returns.std() + 1e-6)
    np.testing.assert_allclose(np.concatenate([first, second]), expected, rtol=1e-6)
