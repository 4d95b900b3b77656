"""Weights that travel between nodes: three raylets on this machine, simulated engines, no learner."""

from __future__ import annotations

import time
from typing import Any, cast

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_nodes import more_nodes, named
from weight_files import ModelFiles, simulated_engines

from raygym.actors.weight_sync import WeightSync
from raygym.config import SyncConfig

TIMEOUT_S = 60.0
# Of what goes between nodes: a member of the group that is stopped is waited for so long, once or twice.
BETWEEN_NODES_S = 20.0
DEADLINE_S = 300.0
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_each_node_receives_once_and_one_that_is_lost_is_left_out(ray_cluster: None) -> None:
    here = ray.get_runtime_context().get_node_id()
    with (
        more_nodes(2, "--num-cpus=2") as (first, second),
        simulated_engines("nodes", 4, turn_latency_s=0.05) as (handle, model_dir),
    ):
        files = ModelFiles(model_dir, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
        config = SyncConfig(lease_s=8, timeout_s=TIMEOUT_S, bucket_mib=1)
        sync = WeightSync(config, cast(Any, files), handle, 4, DEADLINE_S)
        try:
            sync.connect()
            assert sync._stores is not None
            sync._stores._timeout_s = BETWEEN_NODES_S
            nodes = {state.node for state in sync.serving()}
            assert nodes & {first.node_id, second.node_id}, "Serve spreads replicas over the nodes"
            for version in (1, 2):
                files.call("change", version)
                published = sync.publish(version)
                assert (published.replicas, published.fenced, published.resent_buckets) == (4, 0, 0)
                assert len({state.weights for state in sync.serving()}) == 1
            others = len(nodes - {here})
            assert published.control_calls == 1 + others + 4, "learner 0, the other nodes' stores, the replicas"
            assert published.seconds["broadcast"] > 0

            lost = first if first.node_id in nodes else second
            lost.end()
            files.call("change", 3)
            published = sync.publish(3)
            assert published.replicas >= 1
            after = sync.settle(DEADLINE_S, 4)
            assert len(after) == 4 and {state.weights.version for state in after} == {3}
            assert lost.node_id not in {state.node for state in after}
            files.call("change", 4)
            began = time.monotonic()
            assert sync.publish(4).replicas == 4
            assert time.monotonic() - began < BETWEEN_NODES_S, "who is left has met again"

            # A stopped member of the group blocks the broadcast until it is found out.
            (other,) = {first, second} - {lost}
            on_other = [state for state in after if state.node == other.node_id]
            if on_other:
                (store,) = named("ray::WeightStore", other.processes())
                store.suspend()
                files.call("change", 5)
                began = time.monotonic()
                assert sync.publish(5).replicas >= 1
                assert time.monotonic() - began < 4 * BETWEEN_NODES_S
                assert len(sync.settle(DEADLINE_S, 4)) == 4, "another store has taken its place"
                assert not psutil.wait_procs([store], timeout=DEADLINE_S)[1], "and this one is gone"
        finally:
            sync.close()
            ray.kill(files.actor)
