"""An environment that costs nothing and ends after a given number of turns, for benchmarks of everything around it."""

from __future__ import annotations

import random
from typing import Any

from raygym.env import ChatEnv
from raygym.types import Message


class FixedTurns(ChatEnv):
    """Says the same every time."""

    def __init__(self, turns: int = 5, spread: int = 0) -> None:
        """Every task has `turns` turns; or its own number of them, from `turns - spread` to `turns + spread`."""
        self._turns = turns
        self._spread = spread
        self._left = turns

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin."""
        self._left = self._turns
        if self._spread:
            self._left += random.Random(seed).randint(-self._spread, self._spread)
        return f"Task {seed}: go on.", {}

    async def step(self, action: Message) -> Any:
        """Go on, or end."""
        self._left -= 1
        return "Go on.", float(self._left % 2), self._left == 0, False, {}
