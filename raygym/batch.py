"""Groups of trajectories -> the sequences that a learner trains on, each token with its advantage.

Rewards first: weights of components, the penalty of long episodes, KL to the starting policy. Then advantages, of
episodes or of turns. Then what is trained at all.

Legend: G episodes of one group, K turns of one episode, T tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from raygym.algorithms.advantages import ADVANTAGES, overlong_penalized
from raygym.algorithms.kl_in_reward import kl_penalties, penalized_to_go, token_normalized
from raygym.algorithms.multi_reward import WHOLE, Components, decoupled_normalized, weighted_reward
from raygym.algorithms.turn_advantages import turn_advantages
from raygym.method_config import MethodConfig
from raygym.types import EpisodeStatus, Float32Array, Group, TrainSequence, Trajectory

T = TypeVar("T")
Penalties = NDArray[np.float64]
"""T token penalties of one trajectory, 0 outside its mask."""


def train_sequences(
    groups: Sequence[Group], method: MethodConfig, reference: Sequence[Float32Array] | None = None
) -> list[TrainSequence]:
    """One sequence a trajectory, group by group, in episode order.

    Args:
        groups: of one step, all of them: some methods normalise over the step.
        method: of the run, resolved.
        reference: where `method.kl_in_reward`, for each of `without_advantages(groups)` the starting policy's T
            logprobs.
    """
    sequences = without_advantages(groups)
    trajectories = [t for group in groups for t in group.trajectories]
    penalties = [np.zeros(len(t.token_ids)) for t in trajectories]
    if method.kl_in_reward:
        assert reference is not None and len(reference) == len(trajectories)
        penalties = [_penalties(t, logprobs_T, method) for t, logprobs_T in zip(trajectories, reference, strict=True)]
    advantages = _advantages(groups, penalties, method)
    return [
        TrainSequence(
            sequence.token_ids,
            mask := sequence.loss_mask if _trains(t, method) else np.zeros_like(sequence.loss_mask),
            sequence.logprobs,
            np.where(mask, advantages_T, 0).astype(np.float32),
            sequence.group,
        )
        for sequence, t, advantages_T in zip(sequences, trajectories, advantages, strict=True)
    ]


def without_advantages(groups: Sequence[Group]) -> list[TrainSequence]:
    """The same sequences, before there are advantages."""
    return [
        TrainSequence.uniform(t.token_ids, t.loss_mask, t.logprobs, 0.0, number)
        for number, group in enumerate(groups)
        for t in group.trajectories
    ]


def _trains(trajectory: Trajectory, method: MethodConfig) -> bool:
    """DAPO's overlong filtering (arXiv 2503.14476, section 3.4) masks the loss of samples that were cut short, and
    nothing else: their rewards stay in the baseline of their group. Cut short is an episode that did not end by itself,
    and one whose last turn ran into its limit of tokens."""
    if method.overlong != "filtered":
        return True
    cut = bool(trajectory.turns) and trajectory.turns[-1].finish_reason == "length"
    return trajectory.status is not EpisodeStatus.TRUNCATED and not cut


def _penalties(trajectory: Trajectory, reference_T: Float32Array, method: MethodConfig) -> Penalties:
    mask, penalties_T = trajectory.loss_mask, np.zeros(len(trajectory.token_ids))
    penalties_T[mask] = kl_penalties(trajectory.logprobs[mask], reference_T[mask], method.kl_coef, method.kl_estimator)
    return penalties_T


def _advantages(groups: Sequence[Group], penalties: list[Penalties], method: MethodConfig) -> list[Float32Array]:
    """T advantages of each trajectory; what stands outside its mask has no meaning."""
    trajectories = [t for group in groups for t in group.trajectories]
    sizes = [len(group.trajectories) for group in groups]
    if method.credit == "turn":
        by_turn = turn_advantages(method.advantage, _turn_rewards(groups, penalties, method), method.gamma)
        per_episode = [advantages_K for group in by_turn for advantages_K in group]
        return [_over_turns(t, advantages_K) for t, advantages_K in zip(trajectories, per_episode, strict=True)]
    if method.advantage == "gdpo":
        components = _grouped([_components(t) for t in trajectories], sizes)
        by_group = decoupled_normalized(components, method.reward_weights)
    else:
        rewards = [_reward(t, method) for t in trajectories]
        if method.kl_in_reward and method.advantage == "reinforce_pp":
            return _token_by_token(trajectories, rewards, penalties)
        # Of methods that compare whole episodes, the penalties of an episode's tokens are taken together.
        totals = [reward - penalties_T.sum() for reward, penalties_T in zip(rewards, penalties, strict=True)]
        by_group = ADVANTAGES[method.advantage](_grouped(totals, sizes))
    per_trajectory = [float(advantage) for advantages_G in by_group for advantage in advantages_G]
    return [np.full(len(t.token_ids), a, np.float32) for t, a in zip(trajectories, per_trajectory, strict=True)]


def _reward(trajectory: Trajectory, method: MethodConfig) -> float:
    reward = trajectory.reward
    if method.reward_weights:
        reward = weighted_reward(_components(trajectory), method.reward_weights)
    return reward - _overlong_penalty(trajectory, method)


def _components(trajectory: Trajectory) -> Components:
    return trajectory.reward_components or {WHOLE: trajectory.reward}


def _overlong_penalty(trajectory: Trajectory, method: MethodConfig) -> float:
    if method.overlong != "shaped":
        return 0.0
    assert method.overlong_length is not None and method.overlong_buffer is not None, "resolved() comes first"
    generated = int(trajectory.loss_mask.sum())
    length, buffer = method.overlong_length, method.overlong_buffer
    return -float(overlong_penalized([0.0], [generated], length, buffer, method.overlong_penalty)[0])


def _turn_rewards(groups: Sequence[Group], penalties: list[Penalties], method: MethodConfig) -> list[list[list[float]]]:
    """Each turn's reward, less the KL of its tokens; the last turn pays for the length."""
    found = []
    for t, penalties_T in zip((t for group in groups for t in group.trajectories), penalties, strict=True):
        rewards_K = [turn.reward - float(penalties_T[turn.start : turn.end].sum()) for turn in t.turns]
        if rewards_K:
            rewards_K[-1] -= _overlong_penalty(t, method)
        found.append(rewards_K)
    return _grouped(found, [len(group.trajectories) for group in groups])


def _over_turns(trajectory: Trajectory, advantages_K: Float32Array) -> Float32Array:
    advantages_T = np.zeros(len(trajectory.token_ids), dtype=np.float32)
    for turn, advantage in zip(trajectory.turns, advantages_K, strict=True):
        advantages_T[turn.start : turn.end] = advantage
    return advantages_T


def _token_by_token(
    trajectories: list[Trajectory], rewards: list[float], penalties: list[Penalties]
) -> list[Float32Array]:
    masks = [t.loss_mask for t in trajectories]
    to_go = [penalized_to_go(r, p_T[mask]) for r, p_T, mask in zip(rewards, penalties, masks, strict=True)]
    found = [np.zeros(len(mask), dtype=np.float32) for mask in masks]
    for advantages_T, mask, trained in zip(found, masks, token_normalized(to_go), strict=True):
        advantages_T[mask] = trained
    return found


def _grouped(values: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    ends = list(accumulate(sizes))
    return [list(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
