"""What an error of a Serve call means for the episode that waited for it; asking all replicas in these terms."""

from __future__ import annotations

import asyncio
from typing import Any

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


async def replicas_that_answer(handle: Any, method: str, timeout_s: float) -> list[Any]:
    """The answers of those running replicas that give one within `timeout_s`: Serve still lists some that died or hang.

    Raises:
        EpisodeFailure: Serve lists none, or does not say.
    """
    try:
        answers = await asyncio.to_thread(handle.broadcast(method).results, timeout_s=timeout_s, return_exceptions=True)
    except TimeoutError as error:
        late = f"Serve did not list the policy's replicas within {timeout_s:g} s"
        raise EpisodeFailure(FailureKind.ENGINE_TIMEOUT, late) from error
    except Exception as error:
        raise engine_failure(error) from error
    return [answer for answer in answers if not isinstance(answer, Exception)]
