"""Advantages of turns: each turn is credited with what came after it, instead of with its whole episode.

Legend: G episodes of one group, K turns of one episode, which may differ in number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raygym.algorithms.advantages import ADVANTAGES, Advantages
from raygym.types import Float32Array

TurnRewards = Sequence[Sequence[Sequence[float]]]
"""For each group of a step, for each of its G episodes, the rewards of its K turns."""


def turn_returns(rewards_K: Sequence[float], gamma: float) -> NDArray[np.float64]:
    """The K discounted returns of one episode: of turn k, the sum over j >= k of gamma^(j - k) r_j.

    Source: GTPO, arXiv 2511.14846: the return of a turn, discounted by turns, not by tokens.
    """
    returns_K = np.zeros(len(rewards_K))
    after = 0.0
    for turn in range(len(rewards_K) - 1, -1, -1):
        after = float(rewards_K[turn]) + gamma * after
        returns_K[turn] = after
    return returns_K


def turn_advantages(name: str, rewards: TurnRewards, gamma: float) -> list[list[Float32Array]]:
    """For each group and episode its K advantages: `learner.advantage` applied to the returns of turns.

    Turn k of an episode is compared with the k-th turns of its group's other episodes. After multi-turn GRPO,
    arXiv 2505.11821, which normalises what belongs to one turn within the group; its episodes all have the same number
    of turns. Here they need not: an episode that ended earlier is not in the comparison of the turns that it did not
    have, neither as a 0 nor otherwise. A turn that only one episode of its group has reached is compared with nothing
    and gets 0. With `reinforce_pp`, which looks at no groups, every turn is compared with all turns of the step.

    Args:
        name: of `ADVANTAGES`. "Group" there is here the turns that are compared.
        rewards: of turns.
        gamma: discount from turn to turn.
    """
    method: Advantages = ADVANTAGES[name]
    returns = [[turn_returns(rewards_K, gamma) for rewards_K in group] for group in rewards]
    cells: list[list[tuple[int, int, int]]] = []
    """Places (group, episode, turn) of the turns that are compared with each other."""
    for number, group in enumerate(returns):
        for turn in range(max((len(returns_K) for returns_K in group), default=0)):
            cell = [(number, episode, turn) for episode, returns_K in enumerate(group) if turn < len(returns_K)]
            if len(cell) > 1 or name == "reinforce_pp":
                cells.append(cell)
    found = [[np.zeros(len(returns_K), dtype=np.float32) for returns_K in group] for group in returns]
    compared = method([[float(returns[number][episode][turn]) for number, episode, turn in cell] for cell in cells])
    for cell, advantages in zip(cells, compared, strict=True):
        for (number, episode, turn), advantage in zip(cell, advantages, strict=True):
            found[number][episode][turn] = advantage
    return found
