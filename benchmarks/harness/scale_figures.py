"""What `benchmarks/scale.py` reports of what it has measured and played."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from harness.result import rounded
from harness.virtual_cluster import ClusterRun, ClusterSetup
from harness.virtual_manager import ManagerCost

SLOWED_GPUS = 64
"""Beside which the manager is slower and slower."""
REPORTED = (
    "episodes_per_s",
    "share_of_ideal",
    "staleness_mean",
    "slowest_over_median",
    "manager_share_of_core",
    "manager_longest_wait_s",
)
"""Of each row, besides the scheduler's time."""
# Of a turn, in ms, and turns of an episode there: `cpu_ms_per_turn_*` of `rollout.py`, see docs/measurements.md.
CPU_MS_PER_TURN = {"env_runner": 0.26, "replica": 0.08}


Row = dict[str, Any]
"""What became of one run, and which it was: `gpus`, `max_staleness`, `manager_slower`."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What is measured before anything is played."""

    tokens_per_s: float
    """Of an engine by itself, as all engines' share of the ideal is of; virtual."""
    episodes_per_s: float
    costs: Sequence[ManagerCost]
    """Of the manager's process, one for each repetition."""
    ray_call_s: float
    ray_trajectory_s: float

    @property
    def cost(self) -> ManagerCost:
        """The median of each part. What is simulated has one cost, so that a size is the same at each repetition."""
        parts = ("call_s", "begin_s", "end_s")
        return ManagerCost(*(median(getattr(cost, part) for cost in self.costs) for part in parts))


def figures(
    rows: Sequence[Row], slowed: Sequence[Row], parts: Parts, turns: int, *, quick: bool
) -> dict[str, list[float]]:
    """All metrics.

    Args:
        rows: of all sizes and bounds.
        slowed: of SLOWED_GPUS with the usual manager, then with ever slower ones.
        parts: that was measured before.
        turns: of an episode.
        quick: whether the largest size was played for a moment only.
    """
    samples: dict[str, list[float]] = {
        "manager_call_ms": [cost.call_s * 1000 for cost in parts.costs],
        "manager_begin_ms": [cost.begin_s * 1000 for cost in parts.costs],
        "manager_end_ms": [cost.end_s * 1000 for cost in parts.costs],
        "engine_alone_tokens_per_s": [parts.tokens_per_s],
        "engine_alone_episodes_per_s": [parts.episodes_per_s],
    }
    for row in rows:
        name = f"_{row['gpus']}_gpus" + (f"_staleness_{row['max_staleness']}" if row["max_staleness"] != 1 else "")
        keys = ["scheduler_us"] if for_a_moment(row["gpus"], quick) else ["scheduler_us", *REPORTED]
        samples |= {key + name: [row[key]] for key in keys}
    usual, slowest = slowed[0], slowed[-1]
    for row in slowed[1:]:
        factor = f"{row['manager_slower']:g}"
        samples[f"share_of_ideal_manager_{factor}_times_slower"] = [row["share_of_ideal"]]
        samples[f"manager_longest_wait_s_{factor}_times_slower"] = [row["manager_longest_wait_s"]]
    turns_per_s = usual["episodes_per_s"] / SLOWED_GPUS * turns
    return samples | {
        # The most that the slowest manager did, over what engines that wait for no manager do.
        "manager_saturates_at_gpus": [
            slowest["episodes_per_s"] * slowest["manager_slower"] / (usual["episodes_per_s"] / SLOWED_GPUS)
        ],
        # In answers that carry many, which is what a manager that is late gets.
        "manager_limit_episodes_per_s": [1 / cost.episode_s for cost in parts.costs],
        "gpus_per_env_runner": [1000 / (CPU_MS_PER_TURN["env_runner"] * turns_per_s)],
        "replica_share_of_core": [CPU_MS_PER_TURN["replica"] * turns_per_s / 1000],
    }


def for_a_moment(gpus: int, quick: bool) -> bool:
    """Whether a run is too short for its throughput to mean anything."""
    return quick and gpus > SLOWED_GPUS


def in_short(row: Row) -> Row:
    """As it is printed and kept."""
    return {key: rounded(value) for key, value in row.items()}


def told(setup: ClusterSetup, run: ClusterRun, tokens_per_s: float) -> dict[str, float]:
    """One row of the table."""
    return {
        "episodes_at_once": run.most_at_once,
        "episodes_per_s": run.episodes / run.seconds,
        "tokens_per_s": run.tokens / run.seconds,
        "share_of_ideal": run.tokens / run.seconds / (tokens_per_s * setup.gpus),
        "empty_places": run.empty_places,
        "learner_waits": run.learner_waits,
        "staleness_mean": run.staleness_mean,
        "staleness_max": run.staleness_max,
        "slowest_over_median": run.straggler,
        "manager_share_of_core": run.manager_share,
        "manager_longest_wait_s": run.manager_wait_s,
        "scheduler_us": run.scheduler_us,
        "runners": setup.runners,
        "episodes_of_a_step": setup.groups_per_step * setup.workload.group_size,
        "steps_measured": setup.steps,
        "preemptions": run.preemptions,
    }
