"""KL as a part of the reward, against sums written out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raygym.algorithms.kl_in_reward import kl_penalties, penalized_to_go, token_normalized

floats = st.floats(-5, 5)


def test_penalties_give_the_published_numbers() -> None:
    behaviour, reference = np.full(3, -1, np.float32), np.array([0, -15, -30], np.float32)
    np.testing.assert_allclose(kl_penalties(behaviour, reference, 0.5, "k1"), [-0.5, 7, 14.5])
    np.testing.assert_allclose(kl_penalties(behaviour, reference, 2.0, "k2"), [1, 196, 841])
    np.testing.assert_allclose(kl_penalties(behaviour, reference, 1.0, "k3"), [0.7183, 13.0, 28.0], atol=1e-4)


@given(floats, st.lists(floats, min_size=1, max_size=12))
def test_a_token_pays_for_itself_and_what_follows(reward: float, penalties: list[float]) -> None:
    expected = [reward - sum(penalties[at:]) for at in range(len(penalties))]
    np.testing.assert_allclose(penalized_to_go(reward, np.array(penalties)), expected, atol=1e-9)


@given(st.lists(st.lists(st.integers(-20, 20).map(float), max_size=8), min_size=1, max_size=5))
def test_each_token_counts_once_in_the_normalisation(returns: list[list[float]]) -> None:
    everything = np.array([value for row in returns for value in row])
    got = token_normalized([np.array(row) for row in returns])
    for found, row in zip(got, returns, strict=True):
        assert found.dtype == np.float32
        if len(set(everything)) < 2:
            assert not found.any()
        else:
            np.testing.assert_allclose(
                found, (np.array(row) - everything.mean()) / (everything.std() + 1e-6), rtol=1e-5, atol=1e-6
            )
    assert token_normalized([]) == []
