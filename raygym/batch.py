"""Groups of trajectories -> the sequences that a learner trains on, each with its advantage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from raygym.types import Float32Array, Group, TrainSequence

Advantages = Callable[[Sequence[float]], Float32Array]
"""G rewards of one group -> G advantages."""


def train_sequences(groups: Iterable[Group], advantages: Advantages) -> list[TrainSequence]:
    """One sequence a trajectory, group by group, in episode order."""
    return [
        TrainSequence(t.token_ids, t.loss_mask, t.logprobs, float(advantage))
        for group in groups
        for t, advantage in zip(group.trajectories, advantages(group.rewards), strict=True)
    ]
