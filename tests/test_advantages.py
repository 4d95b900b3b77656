import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygym.algorithms.advantages import group_normalized, leave_one_out_baseline, overlong_penalized

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
        leave_one_out_baseline([1.0])


def test_overlong_penalty_gives_the_published_numbers() -> None:
    got = overlong_penalized([1, 0.8, 0.6, 0.4], [10, 22, 25, 30], max_length=25, buffer=5, penalty=0.5)
    np.testing.assert_allclose(got, [1, 0.6, 0.1, -0.6], atol=1e-6)
