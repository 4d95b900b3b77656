"""A task on which a randomly initialised policy of bytes learns something within a minute: to answer in vowels."""

from __future__ import annotations

from typing import Any

from raygym.env import ChatEnv
from raygym.types import Message

VOWELS = frozenset("aeiou")


class Vowels(ChatEnv):
    """One turn. The reward is the share of `length` characters that are vowels, upper case or lower."""

    def __init__(self, length: int = 12) -> None:
        """`length`: of an answer, in characters."""
        self._length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin. The task's seed is in the text, so that tasks differ."""
        super().reset(seed=seed)
        return f"{seed}: vowels, please.", {}

    def step(self, action: Message) -> Any:
        """The episode's end."""
        text = str(action.get("content") or "")[: self._length].lower()
        return "", sum(character in VOWELS for character in text) / self._length, True, False, {}
