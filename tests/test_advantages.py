import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.algorithms.advantages import (
    ADVANTAGES,
    group_normalized,
    leave_one_out,
    leave_one_out_baseline,
    overlong_penalized,
)
from raygym.method_config import AdvantageName

rewards = st.lists(st.floats(-100, 100), min_size=2, max_size=16)


def test_group_normalized_gives_the_published_numbers() -> None:
    np.testing.assert_allclose(group_normalized([1, 3]), [-0.7071, 0.7071], atol=1e-4)
    assert group_normalized([2, 2]).tolist() == [0, 0]


def test_equal_rewards_that_are_no_binary_fractions_give_exactly_zero() -> None:
    assert group_normalized([0.1] * 7).tolist() == [0] * 7


def test_a_group_of_one_has_no_advantage() -> None:
    assert group_normalized([5.0]).tolist() == [0]


@given(rewards)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards_G: list[float]) -> None:
    advantages = group_normalized(rewards_G)
    assert advantages.dtype == np.float32
    assert abs(advantages.sum()) < 1e-3
    assert np.all(np.diff(advantages[np.argsort(rewards_G)]) >= -1e-6)


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=16).filter(lambda r: len(set(r)) > 1), st.floats(1, 50))
def test_advantages_depend_on_neither_offset_nor_scale(rewards_G: list[int], scale: float) -> None:
    moved = group_normalized([scale * reward + 7 for reward in rewards_G])
    np.testing.assert_allclose(group_normalized(rewards_G), moved, atol=1e-4)


def test_leave_one_out_gives_the_published_numbers() -> None:
    np.testing.assert_allclose(leave_one_out_baseline([1, 2, 3]), [2.5, 2, 1.5])
    np.testing.assert_allclose(leave_one_out_baseline([4, 5, 6]), [5.5, 5, 4.5])


def test_leave_one_out_refuses_a_group_of_one() -> None:
    with pytest.raises(ValueError, match="at least 2 episodes, found 1"):
        leave_one_out([1.0])


def test_overlong_penalty_gives_the_published_numbers() -> None:
    got = overlong_penalized([1, 0.8, 0.6, 0.4], [10, 22, 25, 30], max_length=25, buffer=5, penalty=0.5)
    np.testing.assert_allclose(got, [1, 0.6, 0.1, -0.6], atol=1e-6)


step = st.lists(st.lists(st.floats(-100, 100), min_size=2, max_size=8), min_size=1, max_size=6)


def reference(name: str, groups: list[list[float]]) -> list[list[float]]:
    """The published formulas, with plain sums."""

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    def deviation(values: list[float], less: int) -> float:
        return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - less)) + 1e-6

    everything = [reward for group in groups for reward in group]
    centred = [[reward - mean(group) for reward in group] for group in groups]
    match name:
        case "grpo":
            return [[a / deviation(g, 1) for a in c] for g, c in zip(groups, centred, strict=True)]
        case "dr_grpo":
            return centred
        case "rloo":
            return [[r - mean(g[:i] + g[i + 1 :]) for i, r in enumerate(g)] for g in groups]
        case "reinforce_pp":
            return [[(r - mean(everything)) / deviation(everything, 0) for r in g] for g in groups]
        case "reinforce_pp_baseline":
            spread = deviation([a for c in centred for a in c], 0)
            return [[a / spread for a in c] for c in centred]
    raise AssertionError(f"no reference for {name}")


@pytest.mark.parametrize("name", ADVANTAGES)
@given(step)
@settings(max_examples=25)
def test_each_method_equals_its_formula(name: str, groups: list[list[float]]) -> None:
    got = ADVANTAGES[name](groups)
    assert [len(advantages) for advantages in got] == [len(group) for group in groups]
    for advantages, expected in zip(got, reference(name, groups), strict=True):
        assert advantages.dtype == np.float32
        # Rewards of up to 100 that differ by next to nothing are rounding errors divided by epsilon.
        np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


def test_the_config_names_every_method() -> None:
    assert {*ADVANTAGES, "gdpo"} == set(get_args(AdvantageName))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_in_all_groups_give_exactly_zero_and_no_groups_nothing(name: str) -> None:
    assert [advantages.tolist() for advantages in ADVANTAGES[name]([[0.1] * 7, [0.1] * 3])] == [[0] * 7, [0] * 3]
    assert ADVANTAGES[name]([]) == []


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"reinforce_pp"}))
def test_a_group_of_equal_rewards_gives_exactly_zero_beside_others(name: str) -> None:
    equal, other = ADVANTAGES[name]([[0.1] * 7, [0.0, 1.0]])
    assert equal.tolist() == [0] * 7 and other[0] < 0 < other[1]


def test_only_plain_reinforce_pp_credits_a_group_whose_episodes_are_all_better() -> None:
    better, worse = ADVANTAGES["reinforce_pp"]([[1, 1], [0, 0]])
    np.testing.assert_allclose([*better, *worse], [1, 1, -1, -1], rtol=1e-5)
