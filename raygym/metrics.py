"""The scalars of a run: what rollouts, updates and syncs amount to, by the names that people see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean, pstdev
from types import MappingProxyType

from raygym.schedule import Collected
from raygym.types import Trajectory
from raygym.weights import Published

_LEARNED: Mapping[str, str] = MappingProxyType(
    {
        "loss": "loss",
        "lr": "lr",
        "grad/norm": "grad_norm",
        "policy/entropy": "entropy",
        "policy/kl": "kl",
        "policy/kl_k3": "kl_k3",
        "policy/reference_kl": "reference_kl",
        "policy/clip_fraction": "clip_fraction",
        "policy/clip_fraction_low": "clip_fraction_low",
        "policy/clip_fraction_high": "clip_fraction_high",
        "policy/correction_fraction": "correction_fraction",
        "policy/correction_weight": "correction_weight",
        "policy/ratio_mean": "ratio_mean",
        "policy/ratio_min": "ratio_min",
        "policy/ratio_max": "ratio_max",
        "policy/ratio_ess": "ratio_ess",
        "policy/log_ratio_std": "log_ratio_std",
        "policy/logprob_abs_diff": "logprob_abs_diff",
        "policy/logprob_abs_diff_max": "logprob_abs_diff_max",
        "tokens/trained": "tokens_trained",
        "tokens/total": "tokens_total",
        "tokens/padding_fraction": "padding_fraction",
        "tokens/shared_fraction": "shared_fraction",
        "learn/updates": "updates",
        "learn/tokens_per_s": "tokens_per_s",
    }
)
"""What `PolicyUpdate.run` says of each update, which it documents."""
_LEARNED_WHERE_KNOWN: Mapping[str, str] = MappingProxyType({"learn/tflops_per_s": "tflops_per_s", "learn/mfu": "mfu"})


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
        "policy/turns_of_several_versions": sum(_several_versions(t) for t in trajectories),
    }
    metrics |= dict(zip(("manager/loop_lag_ms_p50", "manager/loop_lag_ms_p99"), collected.loop_lag_ms, strict=True))
    metrics["manager/concurrency"] = collected.concurrency
    metrics["manager/restarts"] = collected.manager_restarts
    metrics |= {f"episodes/failed/{kind}": count for kind, count in sorted(collected.failures.items())}
    metrics |= {f"env/{env}/failed": count for env, count in sorted(collected.failures_by_env.items())}
    return metrics | _per_environment(trajectories)


def learn_metrics(stats: Mapping[str, float]) -> dict[str, float]:
    """Scalars of one step's updates, from the `LearnStats` of `PolicyUpdate.run`."""
    metrics = {name: stats[key] for name, key in _LEARNED.items()}
    return metrics | {name: stats[key] for name, key in _LEARNED_WHERE_KNOWN.items() if key in stats}


def sync_metrics(published: Published) -> dict[str, float]:
    """Scalars of one version's way to the engines."""
    return {
        "sync/bytes": published.nbytes,
        "sync/sent_bytes": published.sent_nbytes,
        "sync/sent_share": published.sent_share,
        "sync/largest_error": published.largest_error,
        "sync/replicas": published.replicas,
        "sync/fenced": published.fenced,
        "sync/resent_buckets": published.resent_buckets,
        "sync/broadcast_s": published.broadcast_s,
        "sync/apply_s": published.apply_s,
        "sync/gib_per_s": published.nbytes / 2**30 / published.broadcast_s,
        "sync/turns_restarted": published.turns_restarted,
        "sync/turns_late": published.turns_late,
    }


def validation_metrics(collected: Collected) -> dict[str, float]:
    """Scalars of one validation. A task that failed for good has no reward; it is counted apart."""
    trajectories = [t for group in collected.groups for t in group.trajectories]
    metrics: dict[str, float] = {"val/failed": len(collected.dropped)}
    if trajectories:
        metrics |= {
            "val/reward": fmean(t.reward for t in trajectories),
            "val/turns_mean": fmean(len(t.turns) for t in trajectories),
        }
    return metrics | {f"val/{key}": value for key, value in _per_environment(trajectories).items()}


def _several_versions(trajectory: Trajectory) -> int:
    """Turns during which the weights changed. Within a turn versions only rise."""
    versions_T = trajectory.weight_versions
    spans = ((turn.start, turn.end) for turn in trajectory.turns if turn.end > turn.start)
    return sum(bool(versions_T[start] != versions_T[end - 1]) for start, end in spans)


def _per_environment(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """What tells the environments of a mixture apart, and the environments' own scalars."""
    by_env: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_env.setdefault(trajectory.task.env, []).append(trajectory)
    metrics: dict[str, float] = {}
    for env, played in sorted(by_env.items()):
        if len(by_env) > 1:
            metrics |= {
                f"reward/mean/{env}": fmean(t.reward for t in played),
                f"episodes/completed/{env}": len(played),
                f"episodes/turns_mean/{env}": fmean(len(t.turns) for t in played),
                f"tokens/generated/{env}": sum(int(t.loss_mask.sum()) for t in played),
            }
        steps_s = [turn.env_s for t in played for turn in t.turns]
        metrics[f"env/{env}/step_s"] = fmean(steps_s) if steps_s else 0.0
        for key in sorted({key for t in played for key in t.metrics}):
            metrics[f"env/{env}/{key}"] = fmean(t.metrics[key] for t in played if key in t.metrics)
    return metrics
