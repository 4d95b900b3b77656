"""Which GPUs of how many nodes a run takes: one way in which its bundles fit. Ray decides at the start which way it is.

A bundle is what one Ray actor asks for: a learner's GPUs, or those of one engine with all its tensor-parallel ranks,
which vLLM starts as processes beside it. So a bundle must fit on one node. A part of a GPU must fit on one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import floor

from raygym.config import RunConfig
from raygym.config_section import ConfigError

_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one actor asks for."""

    role: str
    """`learner` or `engine`."""
    number: int
    gpus: float
    key: str
    """The config's key that says how many GPUs."""


@dataclass(slots=True)
class Gpu:
    """One device and who shares it."""

    bundles: list[Bundle] = field(default_factory=list)
    free: float = 1.0

    def take(self, bundle: Bundle, share: float) -> None:
        """Give a share of it away."""
        self.bundles.append(bundle)
        self.free -= share


@dataclass(frozen=True, slots=True)
class Placement:
    """Nodes of equal size, each a list of its GPUs; none where the run needs no GPU."""

    nodes: tuple[tuple[Gpu, ...], ...]
    env_runners: int
    learners_on_cpu: int
    engines_on_cpu: int

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return sum(bool(gpu.bundles) for node in self.nodes for gpu in node)

    @property
    def learners_on_a_node(self) -> int:
        """On the one that has most; without a GPU they are not counted."""
        nodes = ({b.number for gpu in node for b in gpu.bundles if b.role == "learner"} for node in self.nodes)
        return max(map(len, nodes), default=0)

    def kinds(self) -> list[tuple[Bundle, ...]]:
        """Who shares a GPU, one example of each different sharing."""
        found: dict[tuple[tuple[str, int], ...], tuple[Bundle, ...]] = {}
        for node in self.nodes:
            for gpu in node:
                if gpu.bundles:
                    roles = sorted(bundle.role for bundle in gpu.bundles)
                    key = tuple((role, len(list(same))) for role, same in groupby(roles))
                    found.setdefault(key, tuple(gpu.bundles))
        return list(found.values())


def plan_placement(config: RunConfig, gpus_per_node: int) -> Placement:
    """Place learners first, close together, then engines, on as few nodes as this order needs.

    Raises:
        ConfigError: a bundle fits on no node, or is a number of GPUs that Ray does not give.
    """
    policy, learner = config.policy, config.learner
    bundles = _bundles("learner", learner.num_learners, learner.gpus_per_learner, "learner.gpus_per_learner")
    bundles += _bundles("engine", policy.replicas, policy.gpus_per_replica, "policy.gpus_per_replica")
    return Placement(
        nodes=tuple(tuple(node) for node in _place(bundles, gpus_per_node)),
        env_runners=config.rollout.env_runners,
        learners_on_cpu=0 if learner.gpus_per_learner else learner.num_learners,
        engines_on_cpu=0 if policy.gpus_per_replica else policy.replicas,
    )


def _bundles(role: str, count: int, gpus: float, key: str) -> list[Bundle]:
    return [Bundle(role, number, gpus, key) for number in range(count)] if gpus else []


def _place(bundles: Sequence[Bundle], gpus_per_node: int) -> list[list[Gpu]]:
    nodes: list[list[Gpu]] = []
    for bundle in bundles:
        _check(bundle, gpus_per_node)
        if not any(_fits(node, bundle) for node in nodes):
            nodes.append([Gpu() for _ in range(gpus_per_node)])
            assert _fits(nodes[-1], bundle), bundle
    return nodes


def _check(bundle: Bundle, gpus_per_node: int) -> None:
    if bundle.gpus > 1 and bundle.gpus != floor(bundle.gpus):
        raise ConfigError(f"{bundle.key}: {bundle.gpus:g}; above 1, Ray gives whole GPUs only; expected a whole number")
    if bundle.gpus > gpus_per_node:
        raise ConfigError(
            f"{bundle.key}: {bundle.gpus:g} GPUs of one {bundle.role} do not fit on a node of {gpus_per_node} "
            f"(--gpus-per-node); expected at most {gpus_per_node}"
        )


def _fits(node: list[Gpu], bundle: Bundle) -> bool:
    """Take it in, if there is room."""
    whole, part = divmod(bundle.gpus, 1)
    if part:
        free = [gpu for gpu in node if gpu.free >= part - _EPSILON]
        # The fullest that still has room: whole GPUs are left for those who need them.
        chosen, share = sorted(free, key=lambda gpu: gpu.free)[:1], part
    else:
        chosen, share = [gpu for gpu in node if gpu.free == 1.0][: int(whole)], 1.0
        if len(chosen) < whole:
            return False
    for gpu in chosen:
        gpu.take(bundle, share)
    return bool(chosen)


def describe(placement: Placement, gpus_per_node: int) -> list[str]:
    """Lines for people: the totals, then each node, equal ones in one line."""
    lines = []
    if placement.nodes:
        count = len(placement.nodes)
        of = f"{count} node{'s' * (count > 1)} of {gpus_per_node}"
        lines.append(f"{placement.gpus} GPUs on {of}; one way to place them, Ray decides at the start")
    for label, same in groupby(enumerate(map(_node, placement.nodes), 1), key=lambda item: item[1][0]):
        numbered = list(same)
        first, last = numbered[0][0], numbered[-1][0]
        who = f"node {first}" if first == last else f"nodes {first}-{last}, each"
        lines.append(f"{who}: {numbered[0][1][1] if first == last else label}")
    on_cpu = [("learner", placement.learners_on_cpu), ("engine", placement.engines_on_cpu)]
    on_cpu.append(("EnvRunner", placement.env_runners))
    lines.append("without a GPU: " + ", ".join(f"{n} {role}{'s' * (n > 1)}" for role, n in on_cpu if n))
    return lines


def _node(node: tuple[Gpu, ...]) -> tuple[str, str]:
    """How many of each on it, and which."""
    bundles = {(b.role, b.number): b for gpu in node for b in gpu.bundles}
    kinds, which = [], []
    for role, same in groupby(sorted(bundles), key=lambda key: key[0]):
        numbers = [number for _, number in same]
        gpus = bundles[role, numbers[0]].gpus
        each = f" x {gpus:g} GPU{'s' * (gpus != 1)}"
        kinds.append(f"{len(numbers)} {role}{'s' * (len(numbers) > 1)}{each}")
        span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        which.append(f"{role} {span}{each}")
    free = sum(not gpu.bundles for gpu in node)
    tail = [f"{free} free"] if free else []
    return ", ".join(kinds + tail), ", ".join(which + tail)
