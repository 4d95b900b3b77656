"""The policy as EnvRunners call it: one stream to each replica that Serve runs.

A Serve call costs milliseconds of processor time, and a turn is asked for hundreds of times a second. So Serve says
which replicas there are and where they listen; turns and their answers go over a connection to each, those that are
ready at the same moment together.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Any

from ray import serve

from raygym.actors.serve_failures import engine_failure, replicas_that_answer
from raygym.backoff import Backoff
from raygym.least_waiting import LeastWaiting
from raygym.turn_batch import TurnRequest
from raygym.turn_client import TurnClient
from raygym.turn_server import TurnAddress
from raygym.types import EpisodeFailure, Generation, Int32Array, Sampling

logger = logging.getLogger(__name__)
_IDENTIFY_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 10.0
# A replica can take minutes to start, but Serve must say something in between.
_FIRST_REPLICA_TIMEOUT_S = 60.0
# Newcomers are noticed this often, and at once when a replica is lost.
_REFRESH_S = 10.0
_SESSIONS_KEPT = 100_000


class TurnExchange:
    """A `Generate` over the replicas of a PolicyServer. Used from one event loop, which its first call finds."""

    def __init__(self, deployment: str, app: str) -> None:
        """`deployment` of the Serve application `app`; it is looked up at the first call."""
        self._deployment = deployment
        self._app = app
        self._handle: Any = None
        self._clients: LeastWaiting[TurnClient] = LeastWaiting()
        self._replica_of: OrderedDict[str, str] = OrderedDict()
        self._numbers = 0
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_s = float("-inf")
        self._backoff = Backoff(first_s=0.1, most_s=5.0)

    async def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        """One continuation, from the replica that has the session's earlier turns unless it is gone.

        While there is no replica it waits for one: its caller has the deadline of the turn. A failure at once would use
        up all retries of all episodes in the moment that a lost engine needs to start again.

        Raises:
            EpisodeFailure: with the replica's own kind where it raised one, else `engine_lost` when the replica is
                gone, `engine_timeout` when it hangs, and `engine_error` for everything else.
        """
        while not self._clients:
            await asyncio.shield(self._refresh_soon())
        if asyncio.get_running_loop().time() - self._refreshed_s > _REFRESH_S:
            self._refresh_soon()
        self._numbers += 1
        request = TurnRequest(self._numbers, session_id, prompt_token_ids, sampling)
        return await self._client(session_id).ask(request)

    def _client(self, session_id: str) -> TurnClient:
        replica = self._replica_of.get(session_id, "")
        if replica not in self._clients:
            # One that hangs has few turns waiting, since they are given up, and would get all new sessions.
            replica = self._clients.least()
            self._replica_of[session_id] = replica
            while len(self._replica_of) > _SESSIONS_KEPT:
                self._replica_of.popitem(last=False)
        self._replica_of.move_to_end(session_id)
        return self._clients[replica]

    def _refresh_soon(self) -> asyncio.Task[None]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._find_replicas())
            # Whoever waits for it learns of its error; if nobody does, the next call tries again.
            self._refreshing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._refreshing

    async def _find_replicas(self) -> None:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, self._app)
        self._refreshed_s = asyncio.get_running_loop().time()
        try:
            addresses = await replicas_that_answer(self._handle, "turn_address", _IDENTIFY_TIMEOUT_S)
        except EpisodeFailure as failure:
            logger.warning("looking for replicas of the PolicyServer: %s", failure)
            addresses = []
        await asyncio.gather(*(self._connect(a) for a in addresses if a.replica not in self._clients))
        if not self._clients:
            await self._first_replica()

    async def _first_replica(self) -> None:
        """A plain call waits in Serve until a replica runs: nothing else of Serve tells when that is."""
        why = "it cannot be connected to"
        try:
            await self._connect(await asyncio.wait_for(self._handle.turn_address.remote(), _FIRST_REPLICA_TIMEOUT_S))
        except TimeoutError:
            why = f"none said within {_FIRST_REPLICA_TIMEOUT_S:g} s where it takes turns"
        except Exception as error:
            why = str(engine_failure(error))
        if self._clients:
            self._backoff.succeeded()
            return
        logger.warning("no replica of the PolicyServer can be reached: %s", why)
        self._backoff.failed()
        await asyncio.sleep(self._backoff.wait_s())

    async def _connect(self, address: TurnAddress) -> None:
        client = TurnClient(address, self._lost, self._clients.fell)
        try:
            await client.connect(_CONNECT_TIMEOUT_S)
        except OSError as error:
            where = f"{address.host}:{address.port}"
            logger.warning("replica %s takes turns at %s, which cannot be reached: %s", address.replica, where, error)
            return
        self._clients.add(address.replica, client)

    def _lost(self, client: TurnClient) -> None:
        # A connection that ends late must not take its successor's place.
        if self._clients.get(client.address.replica) is client:
            self._clients.remove(client.address.replica)
        self._refreshed_s = float("-inf")
