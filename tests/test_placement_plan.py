"""Bundles on nodes: nothing is split or shared that cannot be, and what does not fit is told by its key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.config import ConfigError, RunConfig
from raygym.config_file import parse_config
from raygym.placement_plan import describe, plan_placement


def config(learners: tuple[int, float], engines: tuple[int, float], **rollout: Any) -> RunConfig:
    return parse_config(
        {
            "name": "t",
            "steps": 1,
            "policy": {"model": "tiny", "replicas": engines[0], "gpus_per_replica": engines[1]},
            "envs": [{"id": "raygym/NumberGuess-v0"}],
            "learner": {"num_learners": learners[0], "gpus_per_learner": learners[1]},
            "rollout": {"groups_per_step": 2520, "env_runners": 3, **rollout},
        }
    )


@pytest.mark.parametrize(
    ("learners", "engines", "gpus", "nodes"),
    [
        ((4, 1), (4, 1), 8, 1),
        ((4, 1), (2, 2), 8, 1),
        ((6, 1), (1, 4), 10, 2),  # the engine does not fit beside them
        ((8, 1), (7, 8), 64, 8),
        ((1, 0.5), (3, 0.5), 2, 1),  # halves of two GPUs
        ((1, 1), (3, 0.4), 3, 1),  # two shares of 0.4 on one GPU, no third
        ((1, 0), (2, 1), 2, 1),
    ],
)
def test_how_many_nodes(learners: tuple[int, float], engines: tuple[int, float], gpus: int, nodes: int) -> None:
    placement = plan_placement(config(learners, engines), 8)
    assert (placement.gpus, len(placement.nodes)) == (gpus, nodes)


def test_without_gpus_there_are_no_nodes() -> None:
    placement = plan_placement(config((2, 0), (1, 0)), 8)
    assert placement.nodes == ()
    assert describe(placement, 8) == ["without a GPU: 2 learners, 1 engine, 3 EnvRunners"]


@settings(max_examples=60, deadline=None)
@given(
    learners=st.one_of(
        st.tuples(st.sampled_from([1, 2, 3, 8, 24]), st.sampled_from([0, 1])),
        st.tuples(st.just(1), st.sampled_from([0.25, 0.4])),
    ),
    engines=st.tuples(st.integers(1, 12), st.sampled_from([0, 0.3, 0.5, 1, 2, 4, 8])),
    per_node=st.sampled_from([8, 16]),
)
def test_every_bundle_is_placed_once_on_one_node(
    learners: tuple[int, float], engines: tuple[int, float], per_node: int
) -> None:
    placement = plan_placement(config(learners, engines), per_node)
    where: dict[tuple[str, int], list[int]] = {}
    for number, node in enumerate(placement.nodes):
        assert len(node) == per_node
        for gpu in node:
            assert sum(min(bundle.gpus, 1.0) for bundle in gpu.bundles) <= 1.0 + 1e-6
            for bundle in gpu.bundles:
                where.setdefault((bundle.role, bundle.number), []).append(number)
    assert all(len(set(nodes)) == 1 for nodes in where.values())
    for role, (count, gpus) in (("learner", learners), ("engine", engines)):
        placed = [nodes for (who, _), nodes in where.items() if who == role]
        assert len(placed) == (count if gpus else 0)
        assert all(len(nodes) == max(1, gpus) for nodes in placed)


@pytest.mark.parametrize(
    ("learners", "engines", "words"),
    [
        ((1, 1), (1, 16), ["policy.gpus_per_replica", "16 GPUs", "node of 8", "--gpus-per-node"]),
        ((1, 1), (1, 12), ["policy.gpus_per_replica", "12 GPUs", "at most 8"]),
        ((1, 1), (1, 1.5), ["policy.gpus_per_replica", "1.5", "whole"]),
    ],
)
def test_what_does_not_fit_is_told_by_key(
    learners: tuple[int, float], engines: tuple[int, float], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_placement(config(learners, engines), 8)
    assert all(word in str(caught.value) for word in words)


def test_equal_nodes_are_told_in_one_line() -> None:
    lines = describe(plan_placement(config((24, 1), (5, 8)), 8), 8)
    assert lines[0].startswith("64 GPUs on 8 nodes of 8")
    assert lines[1] == "nodes 1-3, each: 8 learners x 1 GPU"
    assert lines[2] == "nodes 4-8, each: 1 engine x 8 GPUs"


def test_who_shares_a_gpu() -> None:
    kinds = plan_placement(config((1, 0.5), (3, 0.5)), 8).kinds()
    assert [[bundle.role for bundle in bundles] for bundles in kinds] == [["learner", "engine"], ["engine"] * 2]
