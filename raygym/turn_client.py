"""The EnvRunner's side of the turn stream to one replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raygym.frames import Frames, Soon
from raygym.testing import chaos
from raygym.turn_batch import TurnRequest, pack_turns, unpack_answers
from raygym.turn_server import TurnAddress
from raygym.types import EpisodeFailure, FailureKind, Generation

# While turns wait, the replica is asked this often whether it is alive.
_ASK_EVERY_S = 5.0
# The event loop of a replica can be busy for seconds; one that owes an answer to that for so long hangs.
_SILENT_AFTER_S = 30.0


class TurnClient(Frames):
    """Sends turns to one replica and waits for their answers. Used from one event loop."""

    def __init__(
        self,
        address: TurnAddress,
        lost: Callable[[TurnClient], None],
        fell: Callable[[str], None] = lambda replica: None,
    ) -> None:
        """Not connected yet.

        Args:
            address: of the replica.
            lost: called with this client when the replica is gone or hangs.
            fell: called with the replica when fewer turns are waiting than before.
        """
        super().__init__()
        self.address = address
        self._lost = lost
        self._fell = fell
        self._futures: dict[int, asyncio.Future[Generation]] = {}
        self._unsent: list[TurnRequest] = []
        self._cancelled: list[int] = []
        self._flush = Soon(self._send_waiting)
        # When it was asked whether it is alive, as long as nothing has come since.
        self._asked_s: float | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._watch_due_s = 0.0

    async def connect(self, timeout_s: float) -> None:
        """Connect, within `timeout_s` seconds.

        Raises:
            OSError: the replica cannot be reached, TimeoutError included.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(lambda: self, self.address.host, self.address.port)
        self.send(self.address.secret)

    @property
    def waiting(self) -> int:
        """Turns without an answer yet."""
        return len(self._futures)

    @property
    def suspect(self) -> bool:
        """Whether the replica has owed a sign of life for a while: it is busy, or it hangs."""
        return self._silent_s() > _ASK_EVERY_S

    async def ask(self, request: TurnRequest) -> Generation:
        """Send it, together with what else is asked at this moment; wait for its answer.

        Raises:
            EpisodeFailure: what the replica raised; `engine_lost` when the replica is gone; `engine_timeout` when it
                gives no sign of life.
        """
        loop = asyncio.get_running_loop()
        if self.transport is None or self.transport.is_closing():
            raise self._gone()
        future: asyncio.Future[Generation] = loop.create_future()
        chaos.at("turn.ask")
        self._futures[request.number] = future
        self._unsent.append(request)
        self._flush()
        if self._watch is None:
            self._look_later()
        try:
            return await future
        except asyncio.CancelledError:
            if self._futures.pop(request.number, None) is not None:
                self._cancelled.append(request.number)
                self._flush()
                self._fell(self.address.replica)
            raise

    def received(self, frame: bytes) -> None:
        """Answers, or a sign of life."""
        chaos.at("turn.answer")
        self._asked_s = None
        if not frame:
            return
        for number, answer in unpack_answers(frame).items():
            future = self._futures.pop(number, None)
            if future is None or future.done():
                continue
            if isinstance(answer, Generation):
                future.set_result(answer)
            else:
                future.set_exception(answer)
        self._fell(self.address.replica)

    def ended(self) -> None:
        """The replica is gone."""
        self._fail_all(self._gone())

    def _send_waiting(self) -> None:
        requests = [request for request in self._unsent if request.number in self._futures]
        unsent = {request.number for request in self._unsent}
        cancelled = [number for number in self._cancelled if number not in unsent]
        self._unsent, self._cancelled = [], []
        if requests or cancelled:
            self.send(pack_turns(requests, cancelled))

    def _silent_s(self) -> float:
        return 0.0 if self._asked_s is None else asyncio.get_running_loop().time() - self._asked_s

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._watch_due_s = loop.time() + _ASK_EVERY_S
        self._watch = loop.call_at(self._watch_due_s, self._check_alive)

    def _check_alive(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        if self._asked_s is None:
            if not self._futures:
                return
            self._asked_s = loop.time()
            self.send(b"")
        else:
            # While this loop stood still, it would have heard nobody.
            self._asked_s += loop.time() - self._watch_due_s
            if (silent_s := self._silent_s()) > _SILENT_AFTER_S:
                detail = f"replica {self.address.replica} of the PolicyServer gave no sign of life for {silent_s:.0f} s"
                self._fail_all(EpisodeFailure(FailureKind.ENGINE_TIMEOUT, detail))
                self.close()
                return
        # Also when all turns were given up meanwhile, as with short deadlines: one that hangs must be noticed.
        self._look_later()

    def _gone(self) -> EpisodeFailure:
        return EpisodeFailure(FailureKind.ENGINE_LOST, f"replica {self.address.replica} of the PolicyServer is gone")

    def _fail_all(self, failure: EpisodeFailure) -> None:
        self._lost(self)
        futures, self._futures = self._futures, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(EpisodeFailure(failure.kind, failure.detail))
