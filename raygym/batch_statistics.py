"""What a step's batch says before anything is learned from it: which groups have signal, and who is favoured by length.

Means over all episodes, or over those of one kind; where there are none, or nothing can be said, a metric is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import StatisticsError, correlation, fmean

import numpy as np

from raygym.histogram import Histogram
from raygym.types import EpisodeStatus, Group, TrainSequence, Trajectory

ADVANTAGE_EDGES = (-3.0, -2.0, -1.5, -1.0, -0.5, -1e-6, 1e-6, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Buckets of advantages; the one around 0 is of episodes that say nothing."""


def batch_metrics(groups: Sequence[Group], sequences: Sequence[TrainSequence]) -> dict[str, float]:
    """Scalars of one step's batch.

    Args:
        groups: of the step.
        sequences: what `train_sequences` made of them: one an episode, in the same order.

    Returns:
        `groups/effective`: groups in which some advantage is not 0;
        `advantage/abs_mean`, `advantage/positive_share`, `advantage/negative_share`: over episodes;
        `length/generated_mean`: tokens that the policy made in an episode; `length/trained_mean`: the same of those
        that train, with some advantage that is not 0; `length/positive_mean`, `length/negative_mean`: of those with an
        advantage above and below 0; `length/turns_cut_share`: turns that the token limit ended;
        `length/truncated_share`: episodes that ended without the environment saying so;
        `length/reward_correlation`, Pearson's over episodes; `length/reward_correlation_in_group`, the same of what
        differs from the group's mean, so that tasks which are hard and long do not count.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert len(trajectories) == len(sequences), (len(trajectories), len(sequences))
    advantages_N = episode_advantages(sequences)
    effective, start = 0, 0
    for group in groups:
        end = start + len(group.trajectories)
        effective += any(sequence.has_signal for sequence in sequences[start:end])
        start = end
    metrics: dict[str, float] = {"groups/effective": effective}
    if not trajectories:
        return metrics
    metrics |= {
        "advantage/abs_mean": fmean(abs(advantage) for advantage in advantages_N),
        "advantage/positive_share": fmean(advantage > 0 for advantage in advantages_N),
        "advantage/negative_share": fmean(advantage < 0 for advantage in advantages_N),
    }
    trained_N = [sequence.has_signal for sequence in sequences]
    return metrics | _length_audit(groups, trajectories, advantages_N, trained_N)


def episode_advantages(sequences: Sequence[TrainSequence]) -> list[float]:
    """One advantage for each episode: the mean over its trained tokens, which differ where turns are credited apart."""
    return [float(s.advantages[s.loss_mask].mean(dtype=np.float64)) if s.loss_mask.any() else 0.0 for s in sequences]


def advantage_histogram(sequences: Sequence[TrainSequence]) -> Histogram:
    """How the advantages of a step's episodes are spread."""
    return Histogram.of(episode_advantages(sequences), ADVANTAGE_EDGES)


def _length_audit(
    groups: Sequence[Group],
    trajectories: Sequence[Trajectory],
    advantages_N: Sequence[float],
    trained_N: Sequence[bool],
) -> dict[str, float]:
    lengths_N = [sum(turn.end - turn.start for turn in t.turns) for t in trajectories]
    turns = [turn for t in trajectories for turn in t.turns]
    pairs = list(zip(lengths_N, advantages_N, strict=True))
    subsets: dict[str, Sequence[float]] = {
        "length/generated_mean": lengths_N,
        "length/trained_mean": [length for length, trained in zip(lengths_N, trained_N, strict=True) if trained],
        "length/positive_mean": [length for length, advantage in pairs if advantage > 0.0],
        "length/negative_mean": [length for length, advantage in pairs if advantage < 0.0],
        "length/truncated_share": [t.status is EpisodeStatus.TRUNCATED for t in trajectories],
        "length/turns_cut_share": [turn.finish_reason == "length" for turn in turns],
    }
    metrics = {name: fmean(values) for name, values in subsets.items() if values}
    rewards_N = [t.reward for t in trajectories]
    sizes = [len(group.trajectories) for group in groups]
    correlations = {
        "length/reward_correlation": _correlation(lengths_N, rewards_N),
        "length/reward_correlation_in_group": _correlation(_centred(lengths_N, sizes), _centred(rewards_N, sizes)),
    }
    return metrics | {name: value for name, value in correlations.items() if value is not None}


def _centred(values_N: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Each value minus its group's mean; exactly 0 where all of a group are equal."""
    centred: list[float] = []
    for size in sizes:
        values = values_N[len(centred) : len(centred) + size]
        mean = values[0] if len(set(values)) == 1 else fmean(values)
        centred += [value - mean for value in values]
    return centred


def _correlation(left_N: Sequence[float], right_N: Sequence[float]) -> float | None:
    try:
        return correlation(left_N, right_N)
    except StatisticsError:  # fewer than two, or all equal
        return None
