"""The scalars of a run: what a collection of groups amounts to. Names are those of the design's metrics list."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, pstdev

from raygym.schedule import Collected
from raygym.types import Trajectory


def rollout_metrics(collected: Collected, version: int) -> dict[str, float]:
    """Scalars of one step's rollouts, at training with weight `version`."""
    trajectories = [t for group in collected.groups for t in group.trajectories]
    rewards = [t.reward for t in trajectories]
    multi_turn = [t for t in trajectories if len(t.turns) > 1]
    versions = [int(t.weight_versions[t.loss_mask].min()) for t in trajectories if t.loss_mask.any()]
    metrics = {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "episodes/completed": len(trajectories),
        "episodes/turns_mean": fmean(len(t.turns) for t in trajectories),
        "episodes/truncated": sum(t.status == "truncated" for t in trajectories),
        "groups/dropped": len(collected.dropped),
        "groups/without_spread": sum(len(set(group.rewards)) == 1 for group in collected.groups),
        "tokens/generated": sum(int(t.loss_mask.sum()) for t in trajectories),
        "tokens/drift_rate": fmean(t.drifted for t in multi_turn) if multi_turn else 0.0,
        "policy/version": version,
        "policy/staleness_max": version - min(versions, default=version),
    }
    metrics |= {f"episodes/failed/{kind}": count for kind, count in sorted(collected.failures.items())}
    return metrics | _per_environment(trajectories)


def validation_metrics(collected: Collected) -> dict[str, float]:
    """Scalars of one validation. A task that failed for good has no reward; it is counted apart."""
    trajectories = [t for group in collected.groups for t in group.trajectories]
    metrics: dict[str, float] = {"val/failed": len(collected.dropped)}
    if trajectories:
        metrics |= {
            "val/reward": fmean(t.reward for t in trajectories),
            "val/turns_mean": fmean(len(t.turns) for t in trajectories),
        }
    return metrics


def _per_environment(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    rewards: dict[str, list[float]] = {}
    for trajectory in trajectories:
        rewards.setdefault(trajectory.task.env, []).append(trajectory.reward)
    if len(rewards) == 1:
        return {}
    return {f"reward/mean/{env}": fmean(values) for env, values in sorted(rewards.items())}
