"""Guess a number in a few attempts, with feedback after each: the smallest game that needs several turns.

Data: a task is a range inside [low, high], at least half as wide, and a secret in it, drawn by the task's seed. A fifth
of the ranges, chosen by a hash, is held out for validation: its first prompts never occur in training.

Reward, given at the end, in [0, 1], for a range of N numbers:
    solved at attempt k   max(0.5, 1 - 0.1 (k - 1))
    unsolved              0.5 log(N / R) / log(N), where R numbers are still possible after the last attempt
A reply that is not a whole number and nothing else learns nothing and costs an attempt, and so does a number that is
already excluded. So reward rises with the format, then with guesses inside the range, then with halving it.

Scores with the defaults, averaged over 20,000 seeds of each split (train / validation): halving the range
0.780 / 0.779, a random number that is still possible 0.651 / 0.650, a random number of the first range
0.421 / 0.423, always its middle 0.216 / 0.217, no numbers 0. (`tests/test_envs_builtin.py` checks them on fewer seeds.)
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from raygym.env import ChatEnv
from raygym.envs.generated import held_out, in_split, whole_number
from raygym.types import Message

_NARROWEST = 8
# From here on up a hash that left one split without any range would be a once-in-a-trillion accident.
_WIDE_ENOUGH = 40


class NumberGuess(ChatEnv):
    """The environment says whether the secret is higher or lower, and which numbers are left."""

    def __init__(self, low: int = 1, high: int = 20, attempts: int = 4) -> None:
        """Ranges lie inside [low, high]; `rollout.max_turns` must be at least `attempts`, or no reward is given.

        Raises:
            ValueError: the range is too narrow to hold tasks for training and for validation, or attempts < 1.
        """
        if high - low + 1 < _NARROWEST:
            raise ValueError(f"low, high: {low} to {high} has fewer than {_NARROWEST} numbers; expected a wider range")
        if attempts < 1:
            raise ValueError(f"attempts: {attempts}; expected at least 1")
        self._low, self._high, self._attempts = low, high, attempts
        if high - low < _WIDE_ENOUGH and not _has_both_splits(low, high):
            raise ValueError(f"low, high: {low} to {high} has no range left for validation; expected a wider one")
        self._first = self._last = self._secret = 0
        self._size = self._used = self._valid = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[list[Message], dict[str, Any]]:
        """Choose a range of the split and a secret."""
        super().reset(seed=seed)
        while True:
            ends = self.np_random.integers(self._low, self._high + 1, size=2)
            first, last = int(ends.min()), int(ends.max())
            if last - first + 1 >= _narrowest(self._low, self._high) and in_split(options, first, last):
                break
        self._first, self._last, self._size = first, last, last - first + 1
        self._secret = int(self.np_random.integers(first, last + 1))
        self._used = self._valid = 0
        system: Message = {"role": "system", "content": "Answer with one number."}
        user: Message = {
            "role": "user",
            "content": f"Pick a number from {first} to {last}. Answer with the number only.",
        }
        return [system, user], {"first": first, "last": last, "secret": self._secret}

    def step(self, action: Message) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Compare the guess, narrow the range, and say so; reward comes with the last step."""
        guess = whole_number(action["content"])
        self._used += 1
        self._valid += guess is not None
        if guess == self._secret:
            return "Correct.", max(0.5, 1.0 - 0.1 * (self._used - 1)), True, False, self._info(solved=True)
        feedback = self._narrow(guess)
        if self._used == self._attempts:
            reward = 0.5 * math.log(self._size / (self._last - self._first + 1)) / math.log(self._size)
            return f"The number was {self._secret}.", reward, True, False, self._info(solved=False)
        return f"{feedback}Pick a number from {self._first} to {self._last}.", 0.0, False, False, {}

    def _narrow(self, guess: int | None) -> str:
        if guess is None:
            return ""
        if guess < self._secret:
            self._first = max(self._first, guess + 1)
            return f"{guess} is too low. "
        self._last = min(self._last, guess - 1)
        return f"{guess} is too high. "

    def _info(self, *, solved: bool) -> dict[str, Any]:
        return {
            "metrics": {
                "solved": float(solved),
                "attempts": float(self._used),
                "format": self._valid / self._used,
            }
        }


def _narrowest(low: int, high: int) -> int:
    return (high - low + 2) // 2


@cache
def _has_both_splits(low: int, high: int) -> bool:
    size = _narrowest(low, high)
    ranges = ((first, last) for first in range(low, high + 1) for last in range(first + size - 1, high + 1))
    return len({held_out(first, last) for first, last in ranges}) == 2
