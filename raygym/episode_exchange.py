"""Episodes between a RolloutManager and an EnvRunner: many begin and end in one call, and none holds a call open.

A remote call that waits for its episode holds tens of KiB on either side for as long as it plays, and costs as much
processor time as a turn. So the client keeps one call open to a runner, which answers when episodes are finished; the
next one brings those that begin in their place.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from secrets import token_hex

from raygym.env_host import DeadlineMissed, within
from raygym.frames import Soon
from raygym.types import EpisodeFailure, FailureKind, Sampling, Task, Trajectory

Outcome = Trajectory | EpisodeFailure
# So many begin before the event loop goes on: with thousands at once, each would need a thread for its reset at the
# same moment, and nothing else would have its turn until all have begun.
_BEGIN_AT_ONCE = 16
# Whoever hears of a finished episode begins another a moment later, and both can be in one call.
_NEXT_WITHIN_S = 0.002
_WAIT_S = 20.0
# Beyond the wait: a runner that does not answer by then is stuck, if its supervisor has not said so before.
_ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class EpisodeRequest:
    """One episode to play; see `EnvRunner.run_episode`."""

    number: int
    """Unique among the requests of its client."""
    task: Task
    group_id: str
    episode: int
    attempt: int
    sampling: Sampling
    places: int | None
    first_attempt: int = 0


Finished = list[tuple[int, bytes]]
"""Numbers of requests, each with its pickled Outcome."""
Exchange = Callable[["Client", Sequence[EpisodeRequest], Sequence[int], float], Awaitable[Finished]]
"""`EpisodeServer.exchange`, wherever the server is."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks for episodes."""

    generation: int
    """How many RolloutManagers of the run were lost before this one."""
    name: str = field(default_factory=partial(token_hex, 8))


class EpisodesLost(Exception):
    """The runner died or does not answer: what becomes of the episode is not known."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error

    def __str__(self) -> str:
        """The first line; Ray's errors have many."""
        return next(iter(str(self.error).strip().splitlines()), type(self.error).__name__)


class EpisodeServer:
    """The EnvRunner's side. Used from one event loop."""

    def __init__(self, run: Callable[[EpisodeRequest], Awaitable[Trajectory]]) -> None:
        """Play each request by `run`; what it raises is the episode's failure."""
        self._run = run
        self._client = Client(-1)
        self._waits = 0
        self._unbegun: dict[int, EpisodeRequest] = {}
        self._beginning: asyncio.Task[None] | None = None
        self._playing: dict[int, asyncio.Task[None]] = {}
        self._finished: Finished = []
        self._news = asyncio.Event()

    async def exchange(
        self, client: Client, begin: Sequence[EpisodeRequest], cancelled: Sequence[int], wait_s: float
    ) -> Finished:
        """Begin episodes and end others; what is finished, as soon as there is something, or nothing after `wait_s`.

        Args:
            client: who asks. What a client of an earlier generation has asked for, nobody waits for any more.
            begin: to be played.
            cancelled: numbers of requests that nobody waits for any more, known or not.
            wait_s: how long to wait for an episode to finish; 0: take nothing, since another call waits. Of several
                that wait, the last one gets the news.
        """
        if client != self._client:
            if client.generation < self._client.generation:
                return []  # it was on its way when its sender was lost
            self._take_over(client)
        self._unbegun |= {request.number: request for request in begin}
        for number in cancelled:
            self._unbegun.pop(number, None)
            if number in self._playing:
                _cancel(self._playing[number])
        if self._unbegun and (self._beginning is None or self._beginning.done()):
            self._beginning = asyncio.ensure_future(self._begin())
        if not wait_s:
            return []
        self._waits += 1
        this = self._waits
        self._news.set()  # for a call that waits, and whose answer has nobody to go to
        self._news = asyncio.Event()
        if not self._finished:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
        if this != self._waits or client != self._client:
            return []
        finished, self._finished = self._finished, []
        return finished

    async def _begin(self) -> None:
        while self._unbegun:
            for number in list(islice(self._unbegun, _BEGIN_AT_ONCE)):
                request = self._unbegun.pop(number)
                task = self._playing[number] = asyncio.ensure_future(self._play(self._client, request))
                # Not by the task itself: one that is cancelled before its first step never runs.
                task.add_done_callback(partial(self._ended, number))
            await asyncio.sleep(0)

    def _take_over(self, client: Client) -> None:
        for task in self._playing.values():
            _cancel(task)
        self._client, self._unbegun, self._playing, self._finished = client, {}, {}, []
        self._news.set()

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        if self._playing.get(number) is task:
            del self._playing[number]

    async def _play(self, client: Client, request: EpisodeRequest) -> None:
        try:
            outcome: Outcome = await self._run(request)
        except EpisodeFailure as failure:
            outcome = failure
        except Exception as error:
            outcome = EpisodeFailure(FailureKind.ENV_ERROR, f"its EnvRunner raised {type(error).__name__}: {error}")
        if client == self._client:
            self._finished.append((request.number, _pickled(outcome)))
            self._news.set()


class EpisodeClient:
    """The RolloutManager's side, of one runner. Used from one event loop."""

    def __init__(self, exchange: Exchange, generation: int = 0, first_attempt: int = 0) -> None:
        """Ask by `exchange`; whatever it raises means that the runner is lost. For `generation` see `Client`.

        `first_attempt` is the number of the first attempt at each episode, see `run_episode` in `raygym.episode`.
        """
        self._exchange = exchange
        self._client = Client(generation)
        self._first_attempt = first_attempt
        self._numbers = 0
        self._futures: dict[int, asyncio.Future[Outcome]] = {}
        self._unsent: dict[int, EpisodeRequest] = {}
        self._cancelled: list[int] = []
        self._waiting: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._flush = Soon(self._send)

    @property
    def playing(self) -> int:
        """Episodes without an outcome yet."""
        return len(self._futures)

    async def play(
        self, task: Task, group_id: str, episode: int, attempt: int, sampling: Sampling, places: int | None
    ) -> Outcome:
        """One episode; ends in the runner when its caller is cancelled. The arguments are `EpisodeRequest`'s.

        Raises:
            EpisodesLost: see there.
        """
        self._numbers += 1
        number = self._numbers
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._futures[number] = future
        self._unsent[number] = EpisodeRequest(
            number, task, group_id, episode, attempt, sampling, places, self._first_attempt
        )
        self._flush()
        try:
            return await future
        except asyncio.CancelledError:
            if self._futures.pop(number, None) is not None and self._unsent.pop(number, None) is None:
                self._cancelled.append(number)
                self._flush()
            raise

    def _send(self) -> None:
        begin, self._unsent = list(self._unsent.values()), {}
        cancelled, self._cancelled = self._cancelled, []
        waits = bool(self._futures) and self._waiting is None
        if not (begin or cancelled or waits):
            return
        call = asyncio.ensure_future(self._call(begin, cancelled, _WAIT_S if waits else 0.0))
        if waits:
            self._waiting = call
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _call(self, begin: Sequence[EpisodeRequest], cancelled: Sequence[int], wait_s: float) -> None:
        try:
            finished = await within(self._exchange(self._client, begin, cancelled, wait_s), wait_s + _ANSWER_TIMEOUT_S)
        except DeadlineMissed:
            self._lost(TimeoutError(f"no answer within {wait_s + _ANSWER_TIMEOUT_S:.0f} s"), cancelled)
            return
        except Exception as error:
            self._lost(error, cancelled)
            return
        if self._waiting is not asyncio.current_task():
            return
        self._waiting = None
        for number, outcome in finished:
            future = self._futures.pop(number, None)
            if future is not None and not future.done():
                future.set_result(_read(outcome))
        if self._futures:
            asyncio.get_running_loop().call_later(_NEXT_WITHIN_S, self._send)

    def _lost(self, error: BaseException, unheard: Sequence[int]) -> None:
        """All episodes fail. Should they still play, because it is only the answer that was lost, they are ended."""
        futures, self._futures = self._futures, {}
        self._cancelled += [*unheard, *(number for number in futures if number not in self._unsent)]
        self._unsent = {}
        self._waiting = None
        for future in futures.values():
            if not future.done():
                future.set_exception(EpisodesLost(error))


def _pickled(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as error:  # whatever an environment's own objects raise
        detail = f"its record cannot be sent: {type(error).__name__}: {error}"
        return pickle.dumps(EpisodeFailure(FailureKind.ENV_ERROR, detail))


def _read(outcome: bytes) -> Outcome:
    try:
        read: Outcome = pickle.loads(outcome)
    except Exception as error:  # whatever an environment's own objects raise
        detail = f"its record cannot be read: {type(error).__name__}: {error}"
        return EpisodeFailure(FailureKind.ENV_ERROR, detail)
    return read


def _cancel(task: asyncio.Task[None]) -> None:
    # Once: a second one would cut off the closing of its environment.
    if not task.cancelling():
        task.cancel()
