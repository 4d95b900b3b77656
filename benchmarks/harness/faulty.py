"""An environment that raises or blocks in a share of its episodes, and whose rewards tell of an episode that did."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from raygym.env import ChatEnv
from raygym.types import Message

TURN_REWARD = 1.0
DOOMED_REWARD = -1000.0
"""What an episode gets in each turn before it goes wrong: nobody may ever see it."""
_SCALE = 2**32


class Faulty(ChatEnv):
    """Plays a fixed number of turns, each of reward 1.

    What goes wrong is drawn by a hash of the task's seed (then every attempt at the task does, so that its group must
    be replaced) and by one of what the policy said first (which differs between episodes and attempts, so that a
    retry helps). Both repeat from run to run.
    """

    def __init__(
        self, turns: int, raise_rate: float = 0.0, hang_rate: float = 0.0, lost_tasks: float = 0.0, hang_s: float = 10.0
    ) -> None:
        """Nothing is drawn yet.

        Args:
            turns: of an episode; at least 2, since a fault needs one before it.
            raise_rate: share of attempts in which a step raises.
            hang_rate: share of attempts in which a step blocks.
            lost_tasks: share of tasks whose attempts all raise.
            hang_s: how long a step blocks. A thread that blocks cannot be ended from outside, so that it must end.
        """
        assert turns >= 2, turns
        self._turns = turns
        self._rates = (raise_rate, hang_rate)
        self._lost_tasks = lost_tasks
        self._hang_s = hang_s
        self._played = 0
        self._lost = False
        self._fault = ""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin."""
        self._played, self._fault = 0, ""
        self._lost = share("task", str(seed)) < self._lost_tasks
        self._seed = seed
        return f"Task {seed}: go on.", {}

    def step(self, action: Message) -> Any:
        """Go on, end, raise or block."""
        if self._played == 0:
            self._fault = self._draw(str(action.get("content")))
        self._played += 1
        if self._fault and self._played == self._turns:
            if self._fault == "raise":
                raise RuntimeError("an injected fault of the environment")
            time.sleep(self._hang_s)
        reward = DOOMED_REWARD if self._fault else TURN_REWARD
        return "Go on.", reward, self._played == self._turns, False, {}

    def _draw(self, said: str) -> str:
        raise_rate, hang_rate = self._rates
        drawn = share("attempt", str(self._seed), said)
        if self._lost or drawn < raise_rate:
            return "raise"
        return "hang" if drawn < raise_rate + hang_rate else ""


def share(*parts: str) -> float:
    """A number in [0, 1) that is the same for the same parts."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / _SCALE
