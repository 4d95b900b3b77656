"""FrozenLake and Blackjack of Gymnasium as text: what `raygym/TextGym-v0` uses for them unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.envs.toy_text.frozen_lake import generate_random_map


@dataclass(frozen=True, slots=True)
class Reading:
    """Defaults for one environment of Gymnasium's."""

    observe: str
    """`module:function` from (observation, environment) to text."""
    actions: tuple[str, ...]
    """Names of the actions, in the order of their numbers."""
    instruction: str
    """The rules, told once."""


_LAKE = Reading(
    f"{__name__}:lake",
    ("left", "down", "right", "up"),
    "Walk over a frozen lake from S to G. F is ice, H is a hole that ends the walk without a reward. P is you. "
    "On slippery ice a step may go to the side.",
)
READINGS = {
    "FrozenLake": _LAKE,
    "FrozenLake8x8": _LAKE,
    "Blackjack": Reading(
        f"{__name__}:blackjack",
        ("stick", "hit"),
        "Play Blackjack against the dealer. Come closer to 21 than the dealer without going over it: hit takes a card, "
        "stick ends your turn.",
    ),
}
"""By the name in Gymnasium's id, without the version."""


def lake(observation: Any, env: gymnasium.Env[Any, Any]) -> str:
    """The map as rows of letters, with P where the player stands."""
    rows = [[tile.decode() for tile in row] for row in getattr(env.unwrapped, "desc")]  # noqa: B009 - untyped
    row, column = divmod(int(observation), len(rows[0]))
    under, rows[row][column] = rows[row][column], "P"
    grid = "\n".join("".join(line) for line in rows)
    return grid + {"H": "\nYou fell into a hole.", "G": "\nYou reached the goal."}.get(under, "")


def random_lake(seed: int) -> dict[str, Any]:
    """For `per_task`: a random 4x4 map that can be crossed, another for each task."""
    return {"desc": generate_random_map(size=4, seed=seed)}


def blackjack(observation: Any, env: gymnasium.Env[Any, Any]) -> str:
    """The player's sum, whether an ace counts 11, and the dealer's open card."""
    total, dealer, usable_ace = (int(part) for part in observation)
    ace = " with an ace that counts 11" if usable_ace else ""
    card = "an ace" if dealer == 1 else f"a {dealer}"
    over = " You are over 21." if total > 21 else ""
    return f"Your cards sum to {total}{ace}. The dealer shows {card}.{over}"
