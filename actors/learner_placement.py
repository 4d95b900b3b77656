"""Where the learners' GPUs are: a placement group, so that a gang has all of its GPUs or none."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raygym.config import LearnerConfig


class PlacementError(RuntimeError):
    """The cluster cannot place the learners. The text says how many GPUs are missing."""


class LearnerPlacement:
    """One bundle of `gpus_per_learner` for each rank. Without GPUs nothing is reserved, and all methods do nothing."""

    def __init__(self, config: LearnerConfig, group: PlacementGroup | None) -> None:
        self._config = config
        self._group = group

    @classmethod
    def reserve(cls, config: LearnerConfig) -> LearnerPlacement:
        """Ask for the GPUs and return at once."""
        if not config.gpus_per_learner:
            # Learners on CPUs reserve none, so there is nothing that they could wait for.
            return cls(config, None)
        bundles = [{"GPU": float(config.gpus_per_learner)}] * config.num_learners
        return cls(config, placement_group(bundles, strategy=config.placement.upper(), name="learners"))

    def options(self, rank: int) -> dict[str, Any]:
        """What `.options(...)` of the rank's actor needs to run in its bundle."""
        if self._group is None:
            return {}
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        return {"num_gpus": self._config.gpus_per_learner, "scheduling_strategy": strategy}

    def wait_placed(self, timeout_s: float) -> None:
        """Block until the GPUs are reserved.

        Raises:
            PlacementError: they were not after `timeout_s`.
        """
        if self._group is not None and not self._group.wait(timeout_s):
            raise PlacementError(self._missing())

    def _missing(self) -> str:
        config = self._config
        wanted = config.num_learners * config.gpus_per_learner
        there = ray.cluster_resources().get("GPU", 0.0)
        free = ray.available_resources().get("GPU", 0.0)
        # Enough of them in all may still be pieces that no learner fits in.
        missing = f"{wanted - free:g} missing" if wanted > free else "but not in pieces of the size of a learner"
        return (
            f"learner.num_learners {config.num_learners} x learner.gpus_per_learner {config.gpus_per_learner:g} = "
            f"{wanted:g} GPUs were not free within learner.startup_timeout_s: the cluster has {there:g}, {free:g} of "
            f"them free ({missing}); add nodes, wait for other jobs, or lower these two or policy.replicas"
        )

    def release(self) -> None:
        """Give the GPUs back. Actors that still run in the bundles are killed."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
