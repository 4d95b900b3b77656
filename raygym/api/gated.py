"""HTTP calls at a weight update: those that generate pass the gate that turns pass."""

from __future__ import annotations

from typing import Any

from raygym.admission import Admission
from raygym.api.call import current_call
from raygym.api.errors import ApiError
from raygym.api.front import AsgiApp, Receive, Scope, Send
from raygym.engine import EngineError
from raygym.in_flight import InFlight


class Gated:
    """An engine's ASGI application behind an `InFlight`; it stands behind an `ApiFront`."""

    def __init__(self, app: AsgiApp, in_flight: InFlight, admission: Admission) -> None:
        self._app = app
        self._in_flight = in_flight
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
            ApiError: 503, the engine's weights are unusable, or are not the current ones.
        """
        call = current_call.get()
        if call is None or call.kind == "tokenize":
            await self._app(scope, receive, send)
            return
        try:
            fences = await self._admission.enter()

            async def admitted_send(message: Any) -> None:
                # A replica that was fenced meanwhile answers nothing; a stream that has begun breaks off.
                await self._admission.leave(fences)
                await send(message)

            # Not restartable: the client may have read the beginning of the answer.
            await self._in_flight.run(lambda: self._app(scope, receive, admitted_send), restartable=False)
        except EngineError as error:
            raise ApiError(503, str(error), code="engine_lost") from error
