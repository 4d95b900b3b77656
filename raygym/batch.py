"""Groups of trajectories -> the sequences that a learner trains on, each with its advantage."""

from __future__ import annotations

from collections.abc import Sequence

from raygym.algorithms.advantages import Advantages
from raygym.types import Group, TrainSequence


def train_sequences(groups: Sequence[Group], advantages: Advantages) -> list[TrainSequence]:
    """One sequence a trajectory, group by group, in episode order."""
    return [
        TrainSequence(t.token_ids, t.loss_mask, t.logprobs, float(advantage))
        for group, advantages_G in zip(groups, advantages([group.rewards for group in groups]), strict=True)
        for t, advantage in zip(group.trajectories, advantages_G, strict=True)
    ]
