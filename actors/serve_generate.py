"""The policy as EnvRunners call it: `generate` of a Serve deployment, with every error named by its failure kind."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from raygym.types import EpisodeFailure, FailureKind, Generation, Int32Array, Sampling

# What Ray and Serve raise when the process that held the request is gone.
_LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)


class ServeGenerate:
    """A `Generate` that calls a Serve deployment's `generate`. The handle is looked up at the first call."""

    def __init__(self, deployment: str, app: str) -> None:
        self._deployment = deployment
        self._app = app
        self._handle: DeploymentHandle[Any] | None = None

    async def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        """One continuation. Cancelling the call cancels the request in the replica.

        Raises:
            EpisodeFailure: with the replica's own kind where it raised one, else `engine_lost` when the replica is
                gone, `cancelled` when Serve cancelled the request, and `engine_error` for everything else.
        """
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, self._app)
        # The session keeps an episode on the replica that holds its KV cache.
        handle = self._handle.options(session_id=session_id)
        response = handle.generate.remote(prompt_token_ids, sampling, session_id)
        try:
            generation: Generation = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        except Exception as error:
            raise engine_failure(error) from error
        return generation


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
