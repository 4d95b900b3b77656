"""What an error of a Serve call means for the episode that waited for it."""

from __future__ import annotations

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from raygym.types import EpisodeFailure, FailureKind

# What Ray and Serve raise when the process that held the request is gone.
_LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)


def engine_failure(error: Exception) -> EpisodeFailure:
    """What an error of a Serve call means for the episode."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, EpisodeFailure):
        return EpisodeFailure(cause.kind, cause.detail)
    kind = FailureKind.ENGINE_ERROR
    if isinstance(cause, _LOST):
        kind = FailureKind.ENGINE_LOST
    elif isinstance(cause, TaskCancelledError):
        kind = FailureKind.CANCELLED
    return EpisodeFailure(kind, f"{type(cause).__name__}: {cause}")
