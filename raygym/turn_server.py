"""The engine's side of the turn stream: requests run as they come, answers leave as they are ready."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from raygym.frames import MAX_FRAME_BYTES, Frames, Soon
from raygym.turn_batch import TurnRequest, pack_answers, unpack_turns
from raygym.types import EpisodeFailure, FailureKind, Generation

Answer = Generation | EpisodeFailure
Generate = Callable[[TurnRequest], Awaitable[Generation]]
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class TurnAddress:
    """Where a replica takes turns."""

    replica: str
    """Its name in the application."""
    host: str
    port: int
    secret: bytes = field(repr=False)
    """What a connection must say first; only Ray's own calls carry it."""


class TurnServer:
    """Takes turns from any number of EnvRunners. Used from one event loop."""

    def __init__(self, generate: Generate) -> None:
        """Answer each request by `generate`, which raises EpisodeFailure where it cannot."""
        self._generate = generate
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._listening: asyncio.Future[int] | None = None
        self._server: asyncio.Server | None = None
        self._senders: set[_Sender] = set()

    async def address(self, replica: str, host: str) -> TurnAddress:
        """Listen on `host`, from the first call on, at a free port. Cancelling one caller leaves the others alone."""
        if self._listening is None:
            self._listening = asyncio.ensure_future(self._listen(host))
        return TurnAddress(replica, host, await asyncio.shield(self._listening), self._secret)

    @property
    def running(self) -> int:
        """Requests without an answer yet."""
        return sum(len(sender.running) for sender in self._senders)

    def close(self) -> None:
        """End all connections, and what runs for them. `address` listens again."""
        if self._server is not None:
            self._server.close()
        self._listening = self._server = None
        for sender in list(self._senders):
            sender.close()

    async def _listen(self, host: str) -> int:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._sender, host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _sender(self) -> _Sender:
        return _Sender(self._generate, self._secret, self._senders)


class _Sender(Frames):
    """One EnvRunner's connection. What runs for it ends with it, so that a dead runner keeps no engine busy."""

    max_frame_bytes = _SECRET_BYTES

    def __init__(self, generate: Generate, secret: bytes, senders: set[_Sender]) -> None:
        super().__init__()
        self._generate = generate
        self._secret = secret
        self._senders = senders
        self.running: dict[int, asyncio.Task[None]] = {}
        self._ready: dict[int, Answer] = {}
        self._flush = Soon(self._send_ready)
        self._known = False

    def received(self, frame: bytes) -> None:
        """The secret, then turns. An empty frame asks whether this side is alive."""
        if not self._known:
            if not hmac.compare_digest(frame, self._secret):
                self.close()
                return
            self._known, self.max_frame_bytes = True, MAX_FRAME_BYTES
            self._senders.add(self)
        elif not frame:
            self.send(b"")
        else:
            requests, cancelled = unpack_turns(frame)
            for request in requests:
                self._start(request)
            for number in cancelled:
                self._ready.pop(number, None)
                if number in self.running:
                    self.running[number].cancel()

    def ended(self) -> None:
        """Nobody waits for the answers any more."""
        self._senders.discard(self)
        self._ready.clear()
        for task in self.running.values():
            task.cancel()

    def _start(self, request: TurnRequest) -> None:
        task = self.running[request.number] = asyncio.ensure_future(self._answer(request))
        # Not by the task itself: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda _: self.running.pop(request.number, None))

    async def _answer(self, request: TurnRequest) -> None:
        try:
            answer: Answer = await self._generate(request)
        except asyncio.CancelledError:
            return
        except EpisodeFailure as failure:
            answer = failure
        except Exception as error:
            answer = EpisodeFailure(FailureKind.ENGINE_ERROR, f"{type(error).__name__}: {error}")
        self._ready[request.number] = answer
        self._flush()

    def _send_ready(self) -> None:
        ready, self._ready = self._ready, {}
        if ready:
            self.send(pack_answers(ready))
