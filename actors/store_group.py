"""The weight stores of a run, one on each node that needs weights, and the group that carries weights between nodes."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raygym.actors.learner_group import LearnerError, LearnerGroup
from raygym.actors.ray_errors import cause
from raygym.actors.weight_health import WeightHealth
from raygym.actors.weight_store import start_store
from raygym.backoff import Backoff
from raygym.sent_version import SentVersion
from raygym.supervision import Kind
from raygym.weights import CollectiveTimeout, Manifest, Sending, WeightsError

logger = logging.getLogger(__name__)
# Longer than a process takes to start on a machine that is busy with the start of engines and learners.
_START_TIMEOUT_S = 180.0
_PING_TIMEOUT_S = 10.0
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class _Store:
    actor: Any
    paths: list[str]
    base: int


class StoreGroup:
    """Driver side. Not thread-safe.

    Members of the group are learner 0 and the stores of other nodes. Where a store is lost or a node comes, the members
    leave and meet again in a group of another name, since a broken group cannot be mended.
    """

    def __init__(self, manifest: Manifest, learners: LearnerGroup, timeout_s: float, health: WeightHealth) -> None:
        """Nothing is started yet. Raises LearnerError where learner 0 does not answer."""
        self._health = health
        self._manifest = manifest
        self._learners = learners
        self._timeout_s = timeout_s
        self._sender_node: str = learners.call_first("weight_node", timeout_s=timeout_s)
        self._stores: dict[str, _Store] = {}
        self._opened: Any = None
        # Nodes of those that are in it beside learner 0; None: it is broken.
        self._members: tuple[str, ...] | None = ()
        self._why = ""
        """Why learner 0's node has no store."""
        self._failed: dict[str, tuple[Backoff, float]] = {}
        """Nodes on which no store could be started, and when that is tried again."""
        self.calls = 0
        """Remote calls that were made."""

    @property
    def sender_node(self) -> str:
        """Learner 0's."""
        return self._sender_node

    def paths(self, slot: int) -> dict[str, str]:
        """Node -> the file of a slot there."""
        return {node: store.paths[slot] for node, store in self._stores.items()}

    def ensure(self, nodes: Collection[str], current: int | None = None) -> set[str]:
        """Start the stores that are missing on these nodes and learner 0's. A node that is gone gets none.

        Args:
            nodes: Ray's IDs.
            current: the slot whose content a new store copies from learner 0's node; None: there is none yet.

        Returns:
            Nodes whose store is new.

        Raises:
            WeightsError: learner 0's node can have no store.
            LearnerError: learner 0 does not answer.
        """
        new: set[str] = set()
        for attempt in range(1, _ATTEMPTS + 1):
            new |= self._start(self._missing(nodes), current)
            if self._sender_node in self._stores:
                break
            # Where its node is gone, so is learner 0, and that has to be told.
            self._learners.call_first("ping", timeout_s=self._timeout_s)
            if attempt == _ATTEMPTS:
                raise WeightsError(f"learner 0's node has no weight store after {attempt} attempts: {self._why}")
        self._open()
        return new

    def _missing(self, nodes: Collection[str]) -> set[str]:
        """Nodes that are to have a store and have none, but for those where none could be started just now."""
        waiting = {node for node, (_, again_s) in self._failed.items() if time.monotonic() < again_s}
        return ({*nodes} - waiting | {self._sender_node}) - set(self._stores)

    def _start(self, missing: set[str], current: int | None) -> set[str]:
        starting = {node: start_store(node, self._manifest) for node in missing}
        references = {node: actor.slots.remote() for node, actor in starting.items()}
        self.calls += len(references)
        new: set[str] = set()
        # Learner 0's first: the others copy from it.
        for node in sorted(references, key=lambda node: node != self._sender_node):
            copies = current is not None and node != self._sender_node
            if copies and self._sender_node not in self._stores:  # lost meanwhile, so there is nothing to copy from
                ray.kill(starting[node])
                continue
            try:
                store = _Store(starting[node], *ray.get(references[node], timeout=_START_TIMEOUT_S))
                if copies:
                    source = self._stores[self._sender_node].actor
                    self.calls += 1
                    ray.get(store.actor.pull.remote(source, current, self._timeout_s), timeout=self._timeout_s)
            except RayError as error:
                ray.kill(starting[node])
                inner = error.cause if isinstance(error, RayTaskError) else error
                if node != self._sender_node:
                    # Nobody else finds out about learner 0's, where its node has no replica.
                    if not (copies and self.check({self._sender_node})):
                        self._put_off(node, error)
                    continue
                self._why = cause(error)
                for other in set(starting) - set(self._stores) - {node}:  # they have nothing to copy from
                    ray.kill(starting[other])
                if isinstance(inner, WeightsError):  # too little memory, also next time
                    raise WeightsError(f"learner 0's node {node} has no weight store: {inner}") from error
                break
            else:
                self._failed.pop(node, None)
                self._stores[node] = store
                new.add(node)
                self._health.works(Kind.WEIGHT_STORE, node)
        return new

    def send(self, slot: int, buckets: Sequence[int], sending: Sending) -> SentVersion:
        """Write buckets of the learners' weights into a slot of every store. Stores that are lost on the way drop out.

        Args:
            slot: which.
            buckets: numbers of those that are sent.
            sending: what of them travels. At a second attempt whole buckets do.

        Raises:
            LearnerError: a learner failed.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._regroup()
                return self._send(slot, buckets, sending if attempt == 1 else replace(sending, whole=True))
            except LearnerError as error:
                if not _is_timeout(error) or attempt == _ATTEMPTS:
                    raise
                logger.warning("weights were not sent, attempt %d: %s", attempt, error)
                self.check()
                self._members = None  # whoever is left meets again
        raise AssertionError("unreachable")

    def check(self, nodes: Collection[str] | None = None) -> set[str]:
        """Drop the stores, all or those of these nodes, that do not answer; returns their nodes."""
        asked = self._stores if nodes is None else {node: self._stores[node] for node in nodes}
        references = {node: store.actor.ping.remote() for node, store in asked.items()}
        self.calls += len(references)
        done, _ = ray.wait(list(references.values()), num_returns=len(references), timeout=_PING_TIMEOUT_S)
        lost = set()
        for node, reference in references.items():
            try:
                if reference not in done:
                    raise GetTimeoutError("no answer")
                ray.get(reference, timeout=_PING_TIMEOUT_S)
            except RayError as error:
                lost.add(node)
                self._lost(node, error)
        return lost

    def close(self) -> None:
        """End all stores; their memory goes with them."""
        for node in list(self._stores):
            self._drop(node)

    def _send(self, slot: int, buckets: Sequence[int], sending: Sending) -> SentVersion:
        members = self._members or ()
        receiving = [self._stores[node].actor.receive.remote(slot, buckets, sending.delta) for node in members]
        sent = self._learners.publish_weights(self._manifest, slot, buckets, sending, self._timeout_s)
        self.calls += len(receiving) + self._learners.weight_ranks
        late = ray.wait(receiving, num_returns=len(receiving), timeout=self._timeout_s)[1] if receiving else []
        for node, reference in zip(members, receiving, strict=True):
            try:
                if reference in late:
                    raise GetTimeoutError(f"not received within {self._timeout_s:g} s")
                ray.get(reference, timeout=self._timeout_s)
            except RayError as error:
                # The others have it all: a broadcast ends for each when it has its own part.
                self._lost(node, error)
        return sent

    def _regroup(self) -> None:
        """Make learner 0 and the other nodes' stores one group, where they are not. Who does not join drops out."""
        while (members := tuple(sorted(set(self._stores) - {self._sender_node}))) != self._members:
            self._members = None
            if self._join(members):
                self._members = members

    def _join(self, members: Sequence[str]) -> bool:
        """Whether all of them are in a new group."""
        # Names are used once: Ray remembers a group by its name until every member has left it.
        name, size = f"raygym-weights-{uuid.uuid4().hex[:12]}", len(members) + 1
        joining = [
            self._stores[node].actor.join.remote(name, rank, size, self._timeout_s)
            for rank, node in enumerate(members, 1)
        ]
        group = name if members else ""
        self._learners.call_first("join_weight_group", group, size, self._timeout_s, timeout_s=2 * self._timeout_s)
        self.calls += len(joining) + 1
        joined = True
        for node, reference in zip(members, joining, strict=True):
            try:
                ray.get(reference, timeout=self._timeout_s)
            except RayError as error:
                self._lost(node, error)
                joined = False
        return joined

    def _open(self) -> None:
        store = self._stores[self._sender_node]
        if store is not self._opened:
            self._learners.call_first("open_slots", store.paths, store.base, timeout_s=self._timeout_s)
            self._opened = store

    def _put_off(self, node: str, error: RayError) -> None:
        backoff, _ = self._failed.setdefault(node, (Backoff(first_s=5.0, most_s=300.0), 0.0))
        backoff.failed()
        self._failed[node] = backoff, time.monotonic() + backoff.wait_s()
        logger.warning("node %s has no weight store, which is tried again: %s", node, cause(error))

    def _lost(self, node: str, error: RayError) -> None:
        why = cause(error)
        logger.warning("the weight store of node %s is lost: %s", node, why)
        self._health.lost(Kind.WEIGHT_STORE, node, f"is lost: {why}")
        self._drop(node)

    def _drop(self, node: str) -> None:
        if (store := self._stores.pop(node, None)) is None:
            return
        ray.kill(store.actor)
        # Until it has ended, its memory is not free.
        ray.wait([store.actor.ping.remote()], timeout=_PING_TIMEOUT_S)
        if node in (self._members or ()):
            self._members = None
        if node == self._sender_node and store is self._opened:
            with suppress(LearnerError):  # it is gone as well, and its memory with it
                self._learners.call_first("drop_slots", timeout_s=_PING_TIMEOUT_S)
            self._opened = None


def _is_timeout(error: LearnerError) -> bool:
    cause = error.__cause__
    return isinstance(cause.cause if isinstance(cause, RayTaskError) else cause, CollectiveTimeout)
