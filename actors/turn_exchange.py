"""The policy as EnvRunners call it: turns that are ready at the same moment travel to a replica in one Serve call.

A Serve call costs milliseconds of processor time however much it carries, and a turn is asked for hundreds of times a
second. So each replica has a lane here: requests gather in it, one call takes them all, and its answer brings whatever
is finished by then. A call is always waiting while a turn is, which is how answers get back without one call for each.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from typing import Any

from ray import serve

from raygym.actors.serve_failures import ask_replicas, engine_failure
from raygym.actors.session_router import ONLY
from raygym.env_host import DeadlineMissed, within
from raygym.turn_batch import AnswerBatch, TurnRequest, pack_turns
from raygym.types import EpisodeFailure, FailureKind, Generation, Int32Array, Sampling

# While a lane is busy, requests wait this long for company, and so do answers: less than one call costs. Of 1 to 10 ms
# and one or two calls, this did best with 64 episodes of 100 ms a turn (benchmarks/rollout.py).
_LINGER_S = 0.002
# Calls of one lane that wait for answers.
_WAITING_CALLS = 1
# A call without an answer returns after this, to show that both sides are alive.
_WAIT_S = 10.0
_GRACE_S = 20.0
_IDENTIFY_TIMEOUT_S = 30.0
# Newcomers are noticed this often, and at once when a replica is lost.
_REFRESH_S = 10.0
_SESSIONS_KEPT = 100_000


class TurnExchange:
    """A `Generate` over the replicas of a PolicyServer. Used from one event loop, which its first call finds."""

    def __init__(self, deployment: str, app: str) -> None:
        """`deployment` of the Serve application `app`; it is looked up at the first call."""
        self._deployment = deployment
        self._app = app
        self._sender = uuid.uuid4().hex
        self._handle: Any = None
        self._lanes: dict[str, _Lane] = {}
        self._replica_of: OrderedDict[str, str] = OrderedDict()
        self._numbers = 0
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_s = float("-inf")

    async def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        """One continuation, from the replica that has the session's earlier turns unless it is gone.

        Raises:
            EpisodeFailure: with the replica's own kind where it raised one, else `engine_lost` when the replica is
                gone, `engine_timeout` when it hangs, and `engine_error` for everything else.
        """
        now = asyncio.get_running_loop().time()
        if not self._lanes:
            await self._refresh()
        elif now - self._refreshed_s > _REFRESH_S:
            self._refresh_soon()
        self._numbers += 1
        request = TurnRequest(self._numbers, session_id, prompt_token_ids, sampling)
        return await self._lane(session_id).ask(request)

    def _lane(self, session_id: str) -> _Lane:
        replica = self._replica_of.get(session_id, "")
        if replica not in self._lanes:
            replica = min(self._lanes, key=lambda name: self._lanes[name].waiting)
            self._replica_of[session_id] = replica
            while len(self._replica_of) > _SESSIONS_KEPT:
                self._replica_of.popitem(last=False)
        self._replica_of.move_to_end(session_id)
        return self._lanes[replica]

    def _refresh_soon(self) -> asyncio.Task[None]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._find_replicas())
            # Whoever waits for it learns of its error; if nobody does, the next call tries again.
            self._refreshing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._refreshing

    async def _refresh(self) -> None:
        await asyncio.shield(self._refresh_soon())
        if not self._lanes:
            raise EpisodeFailure(FailureKind.ENGINE_LOST, "no replica of the PolicyServer is running")

    async def _find_replicas(self) -> None:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._deployment, self._app)
        late = "the PolicyServer's replicas did not say who they are"
        names = await ask_replicas(self._handle, "identify", _IDENTIFY_TIMEOUT_S, late)
        self._refreshed_s = asyncio.get_running_loop().time()
        for name in names:
            if name not in self._lanes:
                self._lanes[name] = _Lane(name, self._sender, self._handle, self._lost)

    def _lost(self, replica: str) -> None:
        self._lanes.pop(replica, None)
        self._refreshed_s = float("-inf")


class _Lane:
    """What goes to one replica and comes back from it."""

    def __init__(self, replica: str, sender: str, handle: Any, lost: Any) -> None:
        self._replica = replica
        self._sender = sender
        self._calls = handle.options(session_id=f"{ONLY}{replica}")
        self._lost = lost
        self._futures: dict[int, asyncio.Future[Generation]] = {}
        self._unsent: list[TurnRequest] = []
        self._cancelled: list[int] = []
        self._flushing: asyncio.Handle | None = None
        self._waiting_calls = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Turns without an answer yet."""
        return len(self._futures)

    async def ask(self, request: TurnRequest) -> Generation:
        """Send it with the next call; wait for its answer."""
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._futures[request.number] = future
        self._unsent.append(request)
        self._flush_soon()
        try:
            return await future
        except asyncio.CancelledError:
            if self._futures.pop(request.number, None) is not None:
                self._cancelled.append(request.number)
                self._flush_soon()
            raise

    def _flush_soon(self) -> None:
        if self._flushing is not None:
            return
        loop = asyncio.get_running_loop()
        busy = len(self._futures) > 1
        self._flushing = loop.call_later(_LINGER_S, self._flush) if busy else loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        requests = [request for request in self._unsent if request.number in self._futures]
        cancelled, self._cancelled, self._unsent = tuple(self._cancelled), [], []
        waits = self._waiting_calls < _WAITING_CALLS and bool(self._futures)
        if not requests and not cancelled and not waits:
            return
        task = asyncio.ensure_future(self._exchange(requests, cancelled, waits))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _exchange(self, requests: list[TurnRequest], cancelled: tuple[int, ...], waits: bool) -> None:
        self._waiting_calls += waits
        wait_s = _WAIT_S if waits else 0.0
        batch = pack_turns(requests) if requests else None
        try:
            response = self._calls.exchange.remote(self._replica, self._sender, batch, cancelled, wait_s, _LINGER_S)
            answers: AnswerBatch = await within(_awaited(response), wait_s + _GRACE_S)
        except DeadlineMissed:
            detail = f"replica {self._replica} did not answer within {wait_s + _GRACE_S:.0f} s"
            self._fail_all(EpisodeFailure(FailureKind.ENGINE_TIMEOUT, detail))
            return
        except Exception as error:
            self._fail_all(engine_failure(error))
            return
        finally:
            self._waiting_calls -= waits
        for number, answer in answers.unpack().items():
            future = self._futures.pop(number, None)
            if future is None or future.done():
                continue
            if isinstance(answer, Generation):
                future.set_result(answer)
            else:
                future.set_exception(answer)
        if self._futures and not self._waiting_calls:
            self._flush_soon()

    def _fail_all(self, failure: EpisodeFailure) -> None:
        self._lost(self._replica)
        futures, self._futures = self._futures, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(EpisodeFailure(failure.kind, failure.detail))


async def _awaited(response: Any) -> Any:
    # A coroutine, as `within` wants it: Serve's responses are only awaitable.
    return await response
