"""What a batch says of itself, against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_run_files import trajectory

from raygym.batch import train_sequences
from raygym.batch_statistics import ADVANTAGE_EDGES, advantage_histogram, batch_metrics
from raygym.histogram import Histogram
from raygym.method_config import MethodConfig
from raygym.types import EpisodeStatus, Group, Task, TrainSequence, Trajectory


def group(index: int, episodes: list[tuple[float, int]]) -> Group:
    """Episodes by reward and number of turns, of two tokens each."""
    task = Task(index, "a", index)
    made = [trajectory(task, e, reward, turns=turns) for e, (reward, turns) in enumerate(episodes)]
    return Group(f"train-{index}", task, tuple(made))


def learned(groups: list[Group]) -> list[TrainSequence]:
    return train_sequences(groups, MethodConfig().resolved())


def test_groups_and_lengths() -> None:
    groups = [group(0, [(0.0, 1), (1.0, 3)]), group(1, [(0.5, 4), (0.5, 4)]), group(2, [(1.0, 2), (0.0, 4)])]
    cut = replace(groups[2].trajectories[1].turns[0], finish_reason="length")
    truncated = replace(
        groups[2].trajectories[1],
        status=EpisodeStatus.TRUNCATED,
        turns=(cut, *groups[2].trajectories[1].turns[1:]),
    )
    groups[2] = replace(groups[2], trajectories=(groups[2].trajectories[0], truncated))
    metrics = batch_metrics(groups, learned(groups))
    assert metrics["groups/effective"] == 2
    assert metrics["advantage/abs_mean"] == pytest.approx(4 * 0.5**0.5 / 6, abs=1e-4)
    assert metrics["advantage/positive_share"] == metrics["advantage/negative_share"] == pytest.approx(1 / 3)
    assert metrics["length/generated_mean"] == pytest.approx(2 * 18 / 6)
    assert metrics["length/trained_mean"] == pytest.approx(2 * 10 / 4)
    assert metrics["length/positive_mean"] == pytest.approx(2 * (3 + 2) / 2)
    assert metrics["length/negative_mean"] == pytest.approx(2 * (1 + 4) / 2)
    assert metrics["length/truncated_share"] == pytest.approx(1 / 6)
    assert metrics["length/turns_cut_share"] == pytest.approx(1 / 18)


@given(st.lists(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(1, 6)), min_size=2, max_size=4)))
def test_correlations_equal_numpys(played: list[list[tuple[float, int]]]) -> None:
    groups = [group(index, episodes) for index, episodes in enumerate(played)]
    metrics = batch_metrics(groups, learned(groups))
    rewards = [np.array([t.reward for t in g.trajectories]) for g in groups]
    lengths = [np.array([2.0 * len(t.turns) for t in g.trajectories]) for g in groups]
    centred = [[row - row.mean() for row in rows] for rows in (lengths, rewards)]
    for name, (left, right) in {
        "length/reward_correlation": (lengths, rewards),
        "length/reward_correlation_in_group": tuple(centred),
    }.items():
        pair = [np.concatenate(rows) if rows else np.zeros(0) for rows in (left, right)]
        if any(len(row) < 2 or np.allclose(row, row[0]) for row in pair):
            assert name not in metrics
        else:
            assert metrics[name] == pytest.approx(np.corrcoef(*pair)[0, 1], abs=1e-9)


@given(st.lists(st.floats(-10, 10, allow_subnormal=False) | st.sampled_from(ADVANTAGE_EDGES)))
def test_histograms_count_each_value_once(values: list[float]) -> None:
    histogram = Histogram.of(values, ADVANTAGE_EDGES)
    bounds = [-np.inf, *ADVANTAGE_EDGES, np.inf]
    for count, low, high in zip(histogram.counts, bounds[:-1], bounds[1:], strict=True):
        assert count == sum(low < value <= high for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.total == pytest.approx(sum(values)) and histogram.squares == pytest.approx(
        sum(value * value for value in values)
    )
    if values:
        assert (histogram.low, histogram.high) == (min(values), max(values))


def test_episodes_without_signal_have_a_bucket_of_their_own() -> None:
    groups = [group(0, [(0.0, 1), (1.0, 3)]), group(1, [(0.5, 4), (0.5, 4)])]
    counts = advantage_histogram(learned(groups)).counts
    around_zero = ADVANTAGE_EDGES.index(1e-6)
    assert counts[around_zero] == 2 and sum(counts) == 4


def test_a_batch_that_does_not_belong_to_its_groups_is_refused() -> None:
    groups = [group(0, [(0.0, 1), (1.0, 3)])]
    with pytest.raises(AssertionError):
        batch_metrics(groups, learned(groups)[:1])


def test_a_trajectory_of_no_turns_counts_as_one_of_no_tokens() -> None:
    empty: Trajectory = replace(trajectory(Task(0, "a", 0), 0, 0.0), turns=())
    other = trajectory(Task(0, "a", 0), 1, 1.0, turns=3)
    groups = [Group("train-0", empty.task, (empty, other))]
    assert batch_metrics(groups, learned(groups))["length/generated_mean"] == 3
