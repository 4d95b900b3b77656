"""The rollouts that both learners are fed, and their file. Imported by raygym's Python and by TRL's: NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rollouts:
    """S sequences in groups of G, group after group; each is a prompt and one completion."""

    prompts: list[NDArray[np.int32]]
    """S prompts, the same within a group."""
    completions: list[NDArray[np.int32]]
    logprobs: list[NDArray[np.float32]]
    """Of the completions' tokens, by the policy that sampled."""
    rewards: list[float]
    group_size: int

    @property
    def trained_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(map(len, self.completions))

    def save(self, path: Path) -> None:
        """Write a .npz file."""
        np.savez(
            path,
            rewards=np.asarray(self.rewards),
            group_size=self.group_size,
            **_joined("prompts", self.prompts),
            **_joined("completions", self.completions),
            **_joined("logprobs", self.logprobs),
        )

    @classmethod
    def load(cls, path: Path) -> Rollouts:
        """What `save` wrote."""
        with np.load(path) as arrays:
            prompts, completions, logprobs = (
                np.split(arrays[name], np.cumsum(arrays[f"{name}_lengths"])[:-1])
                for name in ("prompts", "completions", "logprobs")
            )
            rewards, group_size = arrays["rewards"].tolist(), int(arrays["group_size"])
        return cls(prompts, completions, logprobs, rewards, group_size)


def _joined(name: str, parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(parts), f"{name}_lengths": np.array([len(part) for part in parts])}
