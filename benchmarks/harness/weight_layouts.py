"""What benchmarks/weight_sync.py measures: a learner, stores as other nodes have them, and replicas on this node."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import ray

from raygym.actors import cluster, serving
from raygym.actors.learner_group import LearnerGroup
from raygym.actors.weight_store import start_store
from raygym.actors.weight_sync import WeightSync
from raygym.config import HttpConfig, LearnerConfig, PolicyConfig, SyncConfig
from raygym.sent_version import SentVersion
from raygym.weights import Manifest, Published, Sending, WeightsId

_TIMEOUT_S = 120.0


@contextmanager
def learners(model_dir: str) -> Iterator[LearnerGroup]:
    """One DeepSpeed learner with the policy."""
    gang = LearnerGroup.launch(LearnerConfig(), model_dir, temperature=1.0)
    try:
        gang.wait_ready()
        yield gang
    finally:
        gang.shutdown()


class Stores:
    """Learner 0 and a group of stores, without the replicas that would read from them."""

    def __init__(self, gang: LearnerGroup, receivers: int, bucket_bytes: int) -> None:
        """Start and connect them."""
        self._gang = gang
        self._manifest: Manifest = gang.call_first("weight_manifest", bucket_bytes, timeout_s=_TIMEOUT_S)
        node = gang.call_first("weight_node", timeout_s=_TIMEOUT_S)
        self._own, *self._receivers = (start_store(node, self._manifest) for _ in range(1 + receivers))
        (paths, base), *_ = ray.get(
            [store.slots.remote() for store in (self._own, *self._receivers)], timeout=_TIMEOUT_S
        )
        gang.call_first("open_slots", paths, base, timeout_s=_TIMEOUT_S)
        name, size = f"benchmark-{uuid.uuid4().hex[:8]}", 1 + receivers
        joining = [store.join.remote(name, rank, size, _TIMEOUT_S) for rank, store in enumerate(self._receivers, 1)]
        gang.call_first("join_weight_group", name, size, _TIMEOUT_S, timeout_s=_TIMEOUT_S)
        ray.get(joining, timeout=_TIMEOUT_S)
        self._slot = 0

    def send(self) -> tuple[float, SentVersion]:
        """One version to all of them: GiB/s of a version until the last has it, and what the learner says."""
        self._slot = 1 - self._slot
        buckets = list(range(len(self._manifest.buckets)))
        started = time.perf_counter()
        receiving = [store.receive.remote(self._slot, buckets) for store in self._receivers]
        sent = self._gang.publish_weights(self._manifest, self._slot, buckets, Sending(), _TIMEOUT_S)
        ray.get(receiving, timeout=_TIMEOUT_S)
        return self._manifest.nbytes / 2**30 / (time.perf_counter() - started), sent

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gang.call_first("join_weight_group", "", 0, _TIMEOUT_S, timeout_s=_TIMEOUT_S)
        for store in (self._own, *self._receivers):
            ray.kill(store)


class Engines:
    """Replicas on this node, connected to the learner."""

    def __init__(self, gang: LearnerGroup, model_dir: str, engine: str, replicas: int) -> None:
        """Deploy and connect them."""
        self._name = f"benchmark-{replicas}"
        vllm = {"max_model_len": 512} if engine == "vllm" else {}
        policy = PolicyConfig(model=model_dir, engine=engine, replicas=replicas, vllm=vllm)
        policy = serving.with_engine_defaults(policy, model_dir)
        handle = serving.deploy(self._name, policy, model_dir, cluster.http_port(HttpConfig()), leased=True)
        self._sync = WeightSync(SyncConfig(), gang, handle, replicas)
        self._sync.start_from(WeightsId())
        self._sync.connect()
        self._version = 0

    def publish(self) -> Published:
        """One version to all of them."""
        self._version += 1
        return self._sync.publish(self._version)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sync.close()
        serving.undeploy(self._name)
