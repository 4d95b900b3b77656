"""New weights from the learners to every replica, whole or not at all. Driver side; four control calls a version."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from ray.serve.handle import DeploymentHandle

from raygym.actors.learner_group import LearnerGroup
from raygym.actors.policy_server import Applied, ReplicaState
from raygym.actors.serving import broadcast
from raygym.config import SyncConfig
from raygym.weights import Manifest, Published, WeightsError, compare_checksums, model_checksum


class WeightSync:
    """The weight group: learner rank 0 and all replicas."""

    def __init__(
        self, config: SyncConfig, learners: LearnerGroup, engines: DeploymentHandle[ReplicaState], replicas: int
    ) -> None:
        self._config = config
        self._learners = learners
        self._engines = engines
        self._replicas = replicas
        # Names are used once: Ray remembers a group by its name until every member has left it.
        self._group = f"raygym-weights-{uuid.uuid4().hex[:12]}"
        self._manifest: Manifest | None = None

    def connect(self) -> None:
        """Agree on what a version consists of, and connect all members.

        Raises:
            WeightsError: engine and learner do not hold the same tensors.
            TimeoutError: a member did not show up within `sync.timeout_s`.
        """
        timeout_s = self._config.timeout_s
        bucket_bytes = self._config.bucket_mib << 20
        manifest = self._learners.call_all("weight_manifest", bucket_bytes, timeout_s=timeout_s)[0]
        size = 1 + self._replicas
        with ThreadPoolExecutor(1) as pool:
            arguments = (self._group, size, manifest, timeout_s)
            joined = pool.submit(broadcast, self._engines, "join", arguments, self._replicas, 2 * timeout_s)
            self._learners.call_all("join_weight_group", self._group, size, timeout_s, timeout_s=2 * timeout_s)
            joined.result()
        self._manifest = manifest

    def publish(self, version: int) -> Published:
        """Send the learners' current weights as `version` and return when every replica serves them.

        Raises:
            WeightsError: a tensor arrived changed, or a replica ended up with other weights; it serves nothing then.
            TimeoutError: a member did not take part within `sync.timeout_s`.
        """
        assert self._manifest is not None, "connect() first"
        timeout_s = self._config.timeout_s
        started = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(broadcast, self._engines, "receive", (), self._replicas, timeout_s)
            sent = self._learners.call_all("publish_weights", self._manifest, timeout_s=timeout_s)[0]
            received = receiving.result()
        for index, checksums in enumerate(received):
            compare_checksums(sent, checksums, f"a replica ({index + 1} of {self._replicas})")
        broadcasted = time.monotonic()
        checksum = model_checksum(sent)
        arguments = (version, checksum, self._config.on_update, self._config.finish_timeout_s)
        applied: list[Applied] = broadcast(self._engines, "apply", arguments, self._replicas, timeout_s)
        self._check([each.state for each in applied], version, checksum)
        return Published(
            version,
            checksum,
            self._manifest.nbytes,
            broadcasted - started,
            time.monotonic() - broadcasted,
            turns_restarted=sum(each.turns_restarted for each in applied),
            turns_late=sum(each.turns_late for each in applied),
        )

    def _check(self, states: list[ReplicaState], version: int, checksum: str) -> None:
        for state in states:
            if (state.weight_version, state.weights_checksum) != (version, checksum):
                raise WeightsError(
                    f"replica {state.rank} serves version {state.weight_version} ({state.weights_checksum}), "
                    f"expected version {version} ({checksum})"
                )
