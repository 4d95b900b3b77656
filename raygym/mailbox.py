"""The engine's side of a conversation in batches: requests run as they come, answers are taken as they are ready."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable

from raygym.turn_batch import AnswerBatch, TurnBatch, TurnRequest, pack_answers
from raygym.types import EpisodeFailure, FailureKind, Generation

Answer = Generation | EpisodeFailure
Generate = Callable[[TurnRequest], Awaitable[Generation]]
# A sender asks again within seconds as long as it waits for anything.
_SENDER_GONE_AFTER_S = 60.0
_SWEEP_EVERY_S = 15.0


class Mailbox:
    """What one sender asked for. Used from one event loop."""

    def __init__(self, generate: Generate) -> None:
        """Answer each request by `generate`, which raises EpisodeFailure where it cannot."""
        self._generate = generate
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ready: dict[int, Answer] = {}
        self._arrived = asyncio.Event()
        # One taker waits for answers, the others for their turn: an answer must not wake them all.
        self._turn = asyncio.Lock()
        self._takers = 0
        self.seen_s = time.monotonic()
        """When the sender was last heard of, on the monotonic clock; now, while it waits."""

    def start(self, requests: Iterable[TurnRequest]) -> None:
        """Run them all at once."""
        for request in requests:
            self._running[request.number] = asyncio.ensure_future(self._answer(request))

    def cancel(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these any more."""
        for number in numbers:
            self._ready.pop(number, None)
            if number in self._running:
                self._running[number].cancel()

    async def take(self, wait_s: float, linger_s: float) -> dict[int, Answer]:
        """All answers that are ready, each given once; waits up to `wait_s` seconds for the first of them.

        Args:
            wait_s: 0 takes what is there.
            linger_s: once there is one, how long to wait for others that come at nearly the same moment.
        """
        self._takers += 1
        try:
            if wait_s:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s), self._turn:
                        await self._wait()
                        if linger_s and self._running:
                            await asyncio.sleep(linger_s)
                        return self._take()
            return self._take()
        finally:
            self._takers -= 1
            self.seen_s = time.monotonic()

    def abandoned(self, after_s: float) -> bool:
        """Whether the sender has not been heard of for `after_s` seconds."""
        return self._takers == 0 and time.monotonic() - self.seen_s > after_s

    @property
    def running(self) -> int:
        """Requests without an answer yet."""
        return len(self._running)

    def close(self) -> None:
        """The sender is gone: end all that runs for it."""
        self.cancel(list(self._running))
        self._ready.clear()

    def _take(self) -> dict[int, Answer]:
        ready, self._ready = self._ready, {}
        return ready

    async def _wait(self) -> None:
        while not self._ready:
            self._arrived.clear()
            await self._arrived.wait()

    async def _answer(self, request: TurnRequest) -> None:
        try:
            answer: Answer = await self._generate(request)
        except asyncio.CancelledError:
            return
        except EpisodeFailure as failure:
            answer = failure
        except Exception as error:
            answer = EpisodeFailure(FailureKind.ENGINE_ERROR, f"{type(error).__name__}: {error}")
        finally:
            del self._running[request.number]
        self._ready[request.number] = answer
        self._arrived.set()


class Mailboxes:
    """One for each sender; those of senders that died are closed, so that they do not keep the engine busy."""

    def __init__(self, generate: Generate) -> None:
        """See `Mailbox`."""
        self._generate = generate
        self._by_sender: dict[str, Mailbox] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def exchange(
        self, sender: str, requests: TurnBatch | None, cancelled: tuple[int, ...], wait_s: float, linger_s: float
    ) -> AnswerBatch:
        """Start a sender's new requests, end those that it gave up, and give it the answers that are ready.

        See `Mailbox.take` for the times.
        """
        mailbox = self._by_sender.get(sender)
        if mailbox is None:
            mailbox = self._by_sender[sender] = Mailbox(self._generate)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(_SWEEP_EVERY_S, self.close_abandoned)
        if requests is not None:
            mailbox.start(requests.unpack())
        mailbox.cancel(cancelled)
        return pack_answers(await mailbox.take(wait_s, linger_s))

    def close_abandoned(self, after_s: float = _SENDER_GONE_AFTER_S) -> None:
        """Close the mailboxes of senders that were not heard of for `after_s` seconds, and come back later."""
        for sender in [sender for sender, box in self._by_sender.items() if box.abandoned(after_s)]:
            self._by_sender.pop(sender).close()
        self._sweep = None
        if self._by_sender:
            self._sweep = asyncio.get_running_loop().call_later(_SWEEP_EVERY_S, self.close_abandoned)
