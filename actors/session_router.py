"""Which replica serves a request: the one that holds the session's record, then its KV cache, then the least loaded."""

from __future__ import annotations

import pickle
import random

from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from raygym.api.front import SESSION_HEADER, split_session

# A session leaves the replica that holds its cache when that one has this many requests more than twice the least.
_OVERLOAD = 8


class SessionRouter(ConsistentHashRouter):
    """Affinity first, load second. Replicas that died are not candidates: Serve's base class sees to that."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates, the best first; of one rank Serve takes the least loaded."""
        if not candidate_replicas:
            return []
        # Of equally loaded replicas Serve takes the first.
        candidate_replicas = random.sample(candidate_replicas, len(candidate_replicas))
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        recorded, affinity = session_of(pending_request)
        if recorded:
            owner = recorded.partition(".")[0]
            for replica in candidate_replicas:
                if replica.replica_id.unique_id == owner:
                    return [[replica]]
            # It is gone, and so is the record: any replica can say so.
            return [candidate_replicas]
        if not affinity:
            return [candidate_replicas]
        ranked = [self._replicas[key] for key in self._lookup_ranked_replicas(affinity) if key in self._replicas]
        if not ranked or self._queue(ranked[0].replica_id) > _OVERLOAD + 2 * min(
            self._queue(replica.replica_id) for replica in candidate_replicas
        ):
            return [candidate_replicas]
        return [[ranked[0]], candidate_replicas]

    def _queue(self, replica_id: ReplicaID) -> int:
        # Unknown counts as empty: a replica that was not asked for a while has answered all that it was.
        return self.replica_queue_len_cache.get(replica_id) or 0


def session_of(pending_request: PendingRequest) -> tuple[str, str]:
    """The recorded session that a request belongs to, and the key of its affinity; each may be empty."""
    if pending_request.metadata.is_http_request and pending_request.args:
        # Serve's own proxy packed it, without the body; Serve itself looks only at headers, not at paths.
        scope = pickle.loads(pending_request.args[0]).asgi_scope
        path = str(scope.get("path", ""))
        if path.startswith("/sessions/"):
            return split_session(path)[0], ""
        for key, value in scope.get("headers", ()):
            if key.lower() == SESSION_HEADER.encode():
                return value.decode("latin-1"), ""
    return "", pending_request.metadata.session_id
