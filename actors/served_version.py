"""Which weights a PolicyServer serves, for episodes whose tokens do not say it themselves."""

from __future__ import annotations

from typing import Any

from ray import serve

from raygym.actors.serve_failures import ask_replicas
from raygym.types import EpisodeFailure, FailureKind

_TIMEOUT_S = 30.0


class ServedVersion:
    """Asks all replicas of a Serve deployment. The handle is looked up at the first call."""

    def __init__(self, deployment: str, app: str) -> None:
        self._deployment = deployment
        self._app = app
        self._handle: Any = None

    async def __call__(self) -> int:
        """The oldest weight version that a replica serves.

        Raises:
            EpisodeFailure: `engine_timeout` when not every replica answers, `engine_lost` when there is none, and else
                what `engine_failure` says.
        """
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, self._app)
        late = "not every replica told its weight version"
        states = await ask_replicas(self._handle, "state", _TIMEOUT_S, late)
        if not states:
            raise EpisodeFailure(FailureKind.ENGINE_LOST, "no replica of the policy is running")
        return min(int(state.weight_version) for state in states)
