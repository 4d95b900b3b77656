"""What collected trajectories amount to: rewards, pass@k, and each environment by itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from raygym.pass_at_k import ks, pass_at_k


@dataclass(slots=True)
class _Tally:
    """Of one environment. Per task only the rewards are kept, so that a million episodes fit into memory."""

    rewards: dict[int, list[float]] = field(default_factory=dict)
    turns: int = 0
    tokens: int = 0
    multi_turn: int = 0
    drifted: int = 0
    dropped: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class RolloutSummary:
    """Adds up trajectories' records (see `trajectory_record`), whether just played or read back from a file."""

    def __init__(self, samples: int) -> None:
        """Empty.

        Args:
            samples: episodes of each task.
        """
        self._samples = samples
        self._envs: dict[str, _Tally] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """One trajectory."""
        tally = self._envs.setdefault(record["env"], _Tally())
        tally.rewards.setdefault(record["task"], []).append(float(record["reward"]))
        tally.turns += len(record["turns"])
        tally.tokens += sum(record["loss_mask"])
        tally.multi_turn += len(record["turns"]) > 1
        tally.drifted += len(record["turns"]) > 1 and bool(record["drifted"])

    def dropped(self, env: str) -> None:
        """One task of `env` was given up."""
        self._envs.setdefault(env, _Tally()).dropped += 1

    def failed(self, env: str, kind: str, attempts: int) -> None:
        """So many attempts failed, retried ones included."""
        self._envs.setdefault(env, _Tally()).failures[kind] += attempts

    @property
    def episodes(self) -> int:
        """Trajectories added."""
        return sum(len(rewards) for tally in self._envs.values() for rewards in tally.rewards.values())

    @property
    def turns(self) -> int:
        """Of all trajectories."""
        return sum(tally.turns for tally in self._envs.values())

    @property
    def tokens(self) -> int:
        """Generated, of all trajectories."""
        return sum(tally.tokens for tally in self._envs.values())

    @property
    def failures(self) -> dict[str, int]:
        """Failed attempts by kind, the most frequent first."""
        total: Counter[str] = Counter()
        for tally in self._envs.values():
            total.update(tally.failures)
        return dict(total.most_common())

    def failures_by_env(self) -> dict[str, dict[str, int]]:
        """Failed attempts by environment and kind."""
        return {env: dict(tally.failures) for env, tally in sorted(self._envs.items()) if tally.failures}

    def result(self, success: float, seconds: float) -> dict[str, Any]:
        """The whole as JSON. A task that was dropped has no reward and is no failed attempt of pass@k.

        Args:
            success: an episode with at least this reward is a success.
            seconds: that the playing took.
        """
        tallies = [self._envs[env] for env in sorted(self._envs)]
        by_task = [rewards for tally in tallies for rewards in tally.rewards.values()]
        return {
            "episodes": self.episodes,
            "turns": self.turns,
            "tokens": self.tokens,
            "seconds": round(seconds, 1),
            "tokens_per_s": round(self.tokens / seconds, 1) if seconds else None,
            "success": success,
            "dropped_tasks": sum(tally.dropped for tally in tallies),
            "failures": self.failures,
            **self._rewards(by_task, success),
            "envs": {env: self._of_env(self._envs[env], success) for env in sorted(self._envs)},
        }

    def _of_env(self, tally: _Tally, success: float) -> dict[str, Any]:
        by_task = list(tally.rewards.values())
        episodes = sum(map(len, by_task))
        return {
            "episodes": episodes,
            "turns_mean": tally.turns / episodes if episodes else None,
            "tokens": tally.tokens,
            "drift_rate": tally.drifted / tally.multi_turn if tally.multi_turn else None,
            "dropped_tasks": tally.dropped,
            "failures": dict(tally.failures.most_common()),
            **self._rewards(by_task, success),
        }

    def _rewards(self, by_task: list[list[float]], success: float) -> dict[str, Any]:
        # The episodes of one task are not independent: the error is that of the mean of the tasks' means.
        means = [fmean(rewards) for rewards in by_task]
        solved = [sum(reward >= success for reward in rewards) for rewards in by_task]
        return {
            "reward": fmean(means) if means else None,
            "reward_stderr": stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
            "pass_at": {str(k): fmean(pass_at_k(self._samples, c, k) for c in solved) for k in ks(self._samples)}
            if solved
            else {},
        }
