"""Which weights a PolicyServer serves, for episodes whose tokens do not say it themselves."""

from __future__ import annotations

from typing import Any

from ray import serve

from raygym.actors.serve_failures import replicas_that_answer
from raygym.types import EpisodeFailure, FailureKind

# One that is silent for longer serves nothing.
_TIMEOUT_S = 10.0


class ServedVersion:
    """Asks all replicas of a Serve deployment. The handle is looked up at the first call."""

    def __init__(self, deployment: str, app: str) -> None:
        self._deployment = deployment
        self._app = app
        self._handle: Any = None

    async def __call__(self) -> int:
        """The oldest weight version that a replica serves.

        Raises:
            EpisodeFailure: `engine_lost` when no replica serves, and else what `engine_failure` says.
        """
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, self._app)
        states = await replicas_that_answer(self._handle, "state", _TIMEOUT_S)
        versions = [int(state.weights.version) for state in states if state.admitted]
        if not versions:
            raise EpisodeFailure(FailureKind.ENGINE_LOST, "no replica of the policy is running with current weights")
        return min(versions)
