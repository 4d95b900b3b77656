"""Learners' GPUs in placement groups, on two nodes that say to have two GPUs each: nothing here computes on one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray_nodes import more_nodes

from raygym.actors import learner_group
from raygym.actors.learner_group import LearnerError, LearnerGroup
from raygym.actors.learner_placement import LearnerPlacement, PlacementError
from raygym.config import LearnerConfig

pytestmark = [pytest.mark.ray]


def free_gpus() -> float:
    return ray.available_resources().get("GPU", 0.0)


def wait_until_free(count: float) -> None:
    """What Ray says of resources is half a second old."""
    deadline = time.monotonic() + 120
    while free_gpus() != count:
        assert time.monotonic() < deadline, f"{free_gpus()} GPUs are free, expected {count}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def two_gpu_nodes(ray_cluster: None) -> Iterator[None]:
    """Two nodes that join the tests' cluster and leave it again."""
    with more_nodes(2, "--num-cpus=0", "--num-gpus=2"):
        wait_until_free(4)
        yield


def config(**changes: Any) -> LearnerConfig:
    return LearnerConfig(**{"num_learners": 2, "gpus_per_learner": 1, **changes})


def ranks_in(placement: LearnerPlacement, count: int) -> list[tuple[str, list[int]]]:
    """The node and the GPUs of what runs where learners would."""

    def where() -> tuple[str, list[int]]:  # defined here, so that workers need not import the tests
        return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()

    calls = [ray.remote(where).options(num_cpus=0, **placement.options(rank)).remote() for rank in range(count)]
    found: list[tuple[str, list[int]]] = ray.get(calls, timeout=240)
    return found


@pytest.mark.parametrize(("strategy", "nodes"), [("pack", 1), ("spread", 2)])
def test_each_rank_has_a_gpu_of_its_own_and_all_come_back(strategy: str, nodes: int, two_gpu_nodes: None) -> None:
    wait_until_free(4)
    placement = LearnerPlacement.reserve(config(placement=strategy))
    placement.wait_placed(120)
    found = ranks_in(placement, 2)
    assert len({node for node, _ in found}) == nodes
    assert len({(node, *gpus) for node, gpus in found}) == 2 and all(len(gpus) == 1 for _, gpus in found)
    wait_until_free(2)
    placement.release()
    placement.release()
    wait_until_free(4)


def test_missing_gpus_are_counted(two_gpu_nodes: None) -> None:
    wait_until_free(4)
    placement = LearnerPlacement.reserve(config(num_learners=6))
    with pytest.raises(PlacementError, match=r"gpus_per_learner 1 = 6 GPUs .*has 4, 4 of them free \(2 missing\)"):
        placement.wait_placed(0.5)
    placement.release()
    larger = config(num_learners=1).model_copy(update={"gpus_per_learner": 3})  # than a node, as pieces of GPUs may be
    placement = LearnerPlacement.reserve(larger)
    with pytest.raises(PlacementError, match="not in pieces of the size of a learner"):
        placement.wait_placed(0.5)
    placement.release()
    wait_until_free(4)


def test_a_gang_that_cannot_be_placed_says_so_and_leaves_nothing(
    two_gpu_nodes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_group, "_CLOSE_TIMEOUT_S", 0.1)
    group = LearnerGroup.launch(config(num_learners=5, startup_timeout_s=0.5), "nowhere", 1.0)
    with pytest.raises(LearnerError, match="1 missing"):
        group.wait_ready()
    group.shutdown()
    wait_until_free(4)


def test_without_gpus_nothing_is_reserved(ray_cluster: None) -> None:
    placement = LearnerPlacement.reserve(config(gpus_per_learner=0))
    placement.wait_placed(0)
    assert placement.options(1) == {}
    placement.release()
