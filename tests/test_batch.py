"""From a step's groups to what a learner trains on: which rewards count, for which tokens, and what is left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raygym.algorithms.advantages import ADVANTAGES, group_normalized
from raygym.algorithms.multi_reward import decoupled_normalized
from raygym.batch import train_sequences, without_advantages
from raygym.method_config import MethodConfig
from raygym.types import EpisodeStatus, Group, Sampling, Task, TrainSequence, Trajectory, Turn


def method(**keys: Any) -> MethodConfig:
    return MethodConfig(**keys).resolved(most_generated=12)


def trajectory(number: int, episode: int, rewards: list[float], tokens: int = 3, **changes: Any) -> Trajectory:
    """Each turn has two tokens of prompt and `tokens` generated ones."""
    mask = np.tile([False] * 2 + [True] * tokens, len(rewards))
    spans = [(i * (tokens + 2) + 2, (i + 1) * (tokens + 2)) for i in range(len(rewards))]
    rng = np.random.default_rng(10 * number + episode)
    made = Trajectory(
        task=Task(number, "a", number),
        group_id=f"g{number}",
        episode=episode,
        attempt=0,
        status=EpisodeStatus.TERMINATED,
        token_ids=np.arange(len(mask), dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -rng.random(len(mask)), 0).astype(np.float32),
        weight_versions=np.where(mask, 0, -1).astype(np.int32),
        turns=tuple(Turn(*span, r, "stop", 0.1, 0.1) for span, r in zip(spans, rewards, strict=True)),
        reward=sum(rewards),
        messages=(),
        sampling=Sampling(),
    )
    return replace(made, **changes)


def group(number: int, *trajectories: Trajectory) -> Group:
    return Group(f"g{number}", Task(number, "a", number), trajectories)


@pytest.fixture
def groups() -> list[Group]:
    """Two groups; episodes of one and of two turns."""
    return [
        group(0, trajectory(0, 0, [0.0, 1.0]), trajectory(0, 1, [0.5]), trajectory(0, 2, [0.25, 0.0])),
        group(1, trajectory(1, 0, [1.0]), trajectory(1, 1, [0.0])),
    ]


def trained(sequence: TrainSequence) -> np.ndarray:
    return sequence.advantages[sequence.loss_mask]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_episodes_advantage_is_that_of_all_its_tokens(name: str, groups: list[Group]) -> None:
    sequences = train_sequences(groups, method(advantage=name))
    expected = np.concatenate(ADVANTAGES[name]([[1.0, 0.5, 0.25], [1.0, 0.0]]))
    for sequence, advantage in zip(sequences, expected, strict=True):
        assert (trained(sequence) == advantage).all() and not sequence.advantages[~sequence.loss_mask].any()
    assert [sequence.group for sequence in sequences] == [0, 0, 0, 1, 1]


def test_a_turns_advantage_is_that_of_its_tokens(groups: list[Group]) -> None:
    sequences = train_sequences(groups, method(credit="turn", gamma=0.5))
    first = group_normalized([0.5, 0.5, 0.25])
    second = group_normalized([1.0, 0.0])
    np.testing.assert_allclose(trained(sequences[0]), np.repeat([first[0], second[0]], 3))
    np.testing.assert_allclose(trained(sequences[1]), np.repeat(first[1], 3))
    np.testing.assert_allclose(trained(sequences[2]), np.repeat([first[2], second[1]], 3))


NAMED = [
    [{"right": 1.0, "short": -0.5}, {"right": 1.0, "short": 0.0}, {"right": 0.0}],
    [{"right": 0.0, "short": -1.0}, {"right": 1.0, "short": -1.0}],
]


def named() -> list[Group]:
    return [
        group(n, *(trajectory(n, e, [sum(c.values())], reward_components=c) for e, c in enumerate(components)))
        for n, components in enumerate(NAMED)
    ]


def test_gdpo_normalises_components_with_their_weights() -> None:
    sequences = train_sequences(named(), method(algorithm="gdpo", reward_weights={"short": 0.5}))
    expected = np.concatenate(decoupled_normalized(NAMED, {"short": 0.5}))
    np.testing.assert_array_equal([trained(sequence)[0] for sequence in sequences], expected)
    assert len(set(expected.tolist())) > 3, "nothing was told apart"


def test_gdpo_takes_an_unnamed_reward_as_the_only_component(groups: list[Group]) -> None:
    sequences = train_sequences(groups, method(algorithm="gdpo"))
    expected = decoupled_normalized([[{"x": 1.0}, {"x": 0.5}, {"x": 0.25}], [{"x": 1.0}, {"x": 0.0}]], {})
    np.testing.assert_array_equal([trained(sequence)[0] for sequence in sequences], np.concatenate(expected))


def test_weights_of_components_change_the_reward_of_any_method() -> None:
    sequences = train_sequences(named(), method(advantage="dr_grpo", reward_weights={"short": 2.0}))
    expected = ADVANTAGES["dr_grpo"]([[0.0, 1.0, 0.0], [-2.0, -1.0]])
    np.testing.assert_array_equal([trained(sequence)[0] for sequence in sequences], np.concatenate(expected))


def references(groups: list[Group]) -> list[np.ndarray]:
    return [s.logprobs - np.where(s.loss_mask, 0.1 + s.token_ids / 50, 0).astype(np.float32)
            for s in without_advantages(groups)]  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"reinforce_pp"}))
def test_the_kl_of_an_episode_is_taken_off_its_reward(name: str, groups: list[Group]) -> None:
    found = train_sequences(
        groups, method(advantage=name, kl_in="reward", kl_coef=0.5, kl_estimator="k1"), references(groups)
    )
    rewards = [
        [t.reward - 0.5 * sum(0.1 + float(i) / 50 for i in t.token_ids[t.loss_mask]) for t in group.trajectories]
        for group in groups
    ]
    np.testing.assert_allclose(
        [trained(s)[0] for s in found], np.concatenate(ADVANTAGES[name](rewards)), rtol=1e-4, atol=1e-5
    )


def test_with_reinforce_pp_each_token_pays_for_itself_and_what_follows(groups: list[Group]) -> None:
    found = train_sequences(groups, method(algorithm="reinforce_pp", kl_coef=0.5), references(groups))
    returns = []
    for t in (t for group in groups for t in group.trajectories):
        own = [0.5 * (0.1 + float(i) / 50) for i in t.token_ids[t.loss_mask]]
        returns.append([t.reward - sum(own[at:]) for at in range(len(own))])
    everything = np.concatenate(returns)
    for sequence, row in zip(found, returns, strict=True):
        expected = (np.array(row) - everything.mean()) / (everything.std() + 1e-6)
        np.testing.assert_allclose(trained(sequence), expected, rtol=1e-4, atol=1e-5)


def test_with_credit_for_turns_each_turn_pays_for_its_own_tokens() -> None:
    pair = [group(0, trajectory(0, 0, [0.0, 1.0]), trajectory(0, 1, [0.0, 1.0]))]
    reference = [s.logprobs.copy() for s in without_advantages(pair)]
    first = pair[0].trajectories[0].turns[0]
    reference[0][first.start : first.end] -= 0.2  # 3 tokens, k1 0.2 each
    keys = {"advantage": "dr_grpo", "credit": "turn", "kl_in": "reward", "kl_coef": 1.0, "kl_estimator": "k1"}
    one, other = train_sequences(pair, method(**keys), reference)
    np.testing.assert_allclose(trained(one), [-0.3] * 3 + [0.0] * 3, atol=1e-6)
    np.testing.assert_allclose(trained(other), [0.3] * 3 + [0.0] * 3, atol=1e-6)


def test_overlong_episodes_lose_reward() -> None:
    long = [group(0, *(trajectory(0, e, [r], tokens=n) for e, (n, r) in enumerate([(10, 1), (22, 0.8), (25, 0.6)])))]
    keys = {"advantage": "dr_grpo", "overlong_length": 25, "overlong_buffer": 5, "overlong_penalty": 0.5}
    found = train_sequences(long, method(**keys, overlong="shaped"))
    np.testing.assert_allclose([trained(s)[0] for s in found], np.array([1, 0.6, 0.1]) - 1.7 / 3, atol=1e-6)
    by_turn = train_sequences(long, method(**keys, overlong="shaped", credit="turn"))
    np.testing.assert_allclose([trained(s)[0] for s in by_turn], [trained(s)[0] for s in found], atol=1e-6)


def test_the_last_turn_pays_for_the_length() -> None:
    keys = {"advantage": "dr_grpo", "credit": "turn", "gamma": 0.0, "overlong": "shaped", "overlong_length": 6}
    long, short = trajectory(0, 0, [0.0, 0.0]), trajectory(0, 1, [0.0, 0.0], tokens=1)
    found = train_sequences([group(0, long, short)], method(**keys, overlong_buffer=3, overlong_penalty=1.0))
    np.testing.assert_allclose(trained(found[0]), [0.0] * 3 + [-0.5] * 3, atol=1e-6)
    np.testing.assert_allclose(trained(found[1]), [0.0, 0.5], atol=1e-6)


def test_what_was_cut_short_is_not_trained_but_counts_in_the_baseline() -> None:
    whole, cut, over = (trajectory(0, episode, [reward]) for episode, reward in enumerate([1.0, 0.0, 0.5]))
    cut = replace(cut, turns=(replace(cut.turns[0], finish_reason="length"),))
    over = replace(over, status=EpisodeStatus.TRUNCATED)
    plain = train_sequences([group(0, whole, cut, over)], method())
    found = train_sequences([group(0, whole, cut, over)], method(overlong="filtered"))
    np.testing.assert_array_equal(found[0].advantages, plain[0].advantages)
    for sequence in found[1:]:
        assert not sequence.loss_mask.any() and not sequence.has_signal


def test_a_trajectorys_tokens_are_not_changed(groups: list[Group]) -> None:
    before = [t.loss_mask.copy() for g in groups for t in g.trajectories]
    truncated = [
        Group(g.group_id, g.task, tuple(replace(t, status=EpisodeStatus.TRUNCATED) for t in g.trajectories))
        for g in groups
    ]
    train_sequences(truncated, method(overlong="filtered"))
    for t, mask in zip((t for g in truncated for t in g.trajectories), before, strict=True):
        assert (t.loss_mask == mask).all()
