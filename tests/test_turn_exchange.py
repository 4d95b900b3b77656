"""The stream of turns: nothing is changed by packing, each answer is given once, and nobody's requests stay behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.frames import Frames
from raygym.turn_batch import TurnRequest, pack_answers, pack_turns, unpack_answers, unpack_turns
from raygym.turn_client import TurnClient
from raygym.turn_server import TurnAddress, TurnServer
from raygym.types import EpisodeFailure, FailureKind, Generation, Sampling

ids = st.lists(st.integers(0, 2**31 - 1), max_size=20)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    max_tokens=st.integers(1, 100),
    seed=st.none() | st.integers(0, 2**31 - 1),
)


def request(number: int, prompt: list[int] | None = None, sampling: Sampling | None = None) -> TurnRequest:
    return TurnRequest(number, f"s{number}", np.asarray(prompt or [1, 2], np.int32), sampling or Sampling())


def generation(token_ids: list[int]) -> Generation:
    n = len(token_ids)
    logprobs = np.linspace(-3, 0, n, dtype=np.float32)
    return Generation(
        np.asarray(token_ids, np.int32), logprobs, np.arange(n, dtype=np.int32), "stop" if n % 2 else "length"
    )


@settings(max_examples=25)
@given(st.lists(st.tuples(ids, samplings), max_size=8))
def test_packed_turns_are_the_same_turns(turns: list[tuple[list[int], Sampling]]) -> None:
    requests = [
        TurnRequest(number, f"s{number}", np.asarray(prompt, np.int32), sampling)
        for number, (prompt, sampling) in enumerate(turns)
    ]
    unpacked, cancelled = unpack_turns(pack_turns(requests, [3, 5]))
    assert cancelled == [3, 5]
    assert len(unpacked) == len(requests)
    for before, after in zip(requests, unpacked, strict=True):
        assert (before.number, before.session_id, before.sampling) == (after.number, after.session_id, after.sampling)
        assert after.prompt_token_ids.dtype == np.int32
        assert before.prompt_token_ids.tolist() == after.prompt_token_ids.tolist()


@settings(max_examples=25)
@given(st.dictionaries(st.integers(0, 1000), ids | st.sampled_from(list(FailureKind)), max_size=8))
def test_packed_answers_are_the_same_answers(answers: dict[int, Any]) -> None:
    given_answers: dict[int, Generation | EpisodeFailure] = {
        number: EpisodeFailure(answer, "why") if isinstance(answer, str) else generation(answer)
        for number, answer in answers.items()
    }
    unpacked = unpack_answers(pack_answers(given_answers))
    assert set(unpacked) == set(given_answers)
    for number, before in given_answers.items():
        after = unpacked[number]
        if isinstance(before, EpisodeFailure):
            assert isinstance(after, EpisodeFailure) and (after.kind, after.detail) == (before.kind, before.detail)
            continue
        assert isinstance(after, Generation) and after.finish_reason == before.finish_reason
        for name in ("token_ids", "logprobs", "weight_versions"):
            assert getattr(after, name).dtype == getattr(before, name).dtype
            assert getattr(after, name).tolist() == getattr(before, name).tolist()


class Engine:
    """Answers a request when it is told to; odd numbers fail."""

    def __init__(self) -> None:
        self.open: dict[int, asyncio.Event] = {}
        self.cancelled: list[int] = []

    async def __call__(self, asked: TurnRequest) -> Generation:
        event = self.open[asked.number] = asyncio.Event()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancelled.append(asked.number)
            raise
        finally:
            del self.open[asked.number]
        if asked.number % 2:
            raise EpisodeFailure(FailureKind.ENGINE_ERROR, "odd")
        return generation([asked.number])


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


class Pair:
    """An engine behind a server, and a client of it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.server = TurnServer(engine)
        self.lost: list[TurnClient] = []

    async def client(self, **changes: Any) -> TurnClient:
        address = await self.server.address("r1", "127.0.0.1")
        client = TurnClient(replace(address, **changes), self.lost.append)
        await client.connect(30)
        return client

    def asked(self, client: TurnClient, number: int) -> asyncio.Task[Generation]:
        return asyncio.ensure_future(client.ask(request(number)))


@asynccontextmanager
async def pair(engine: Any) -> AsyncIterator[Pair]:
    both = Pair(engine)
    try:
        yield both
    finally:
        both.server.close()


async def test_an_answer_comes_as_soon_as_it_is_there_and_failures_keep_their_kind() -> None:
    engine = Engine()
    async with pair(engine) as p:
        client = await p.client()
        asked = [p.asked(client, number) for number in range(3)]
        await until(lambda: len(engine.open) == 3)
        engine.open[1].set()
        with pytest.raises(EpisodeFailure, match="odd"):
            await asked[1]
        assert not asked[0].done() and client.waiting == 2
        engine.open[2].set()
        assert (await asked[2]).token_ids.tolist() == [2]
        engine.open[0].set()
        assert (await asked[0]).token_ids.tolist() == [0]
        assert p.server.running == client.waiting == 0


async def test_cancelled_turns_end_in_the_engine() -> None:
    engine = Engine()
    async with pair(engine) as p:
        client = await p.client()
        asked = [p.asked(client, number) for number in (0, 2)]
        await until(lambda: len(engine.open) == 2)
        asked[0].cancel()
        await until(lambda: engine.cancelled == [0])
        at_once = p.asked(client, 4)
        await asyncio.sleep(0)
        at_once.cancel()
        engine.open[2].set()
        assert (await asked[1]).token_ids.tolist() == [2]
        await until(lambda: p.server.running == client.waiting == 0 and engine.open == {})


async def test_it_is_told_when_fewer_turns_wait() -> None:
    """By answers, failures and deadlines: whoever chooses by it would not look at this replica again."""
    engine = Engine()
    async with pair(engine) as p:
        told: list[tuple[str, int]] = []
        client = TurnClient(
            await p.server.address("r1", "127.0.0.1"), p.lost.append, lambda name: told.append((name, client.waiting))
        )
        await client.connect(30)
        asked = [p.asked(client, number) for number in range(3)]
        await until(lambda: len(engine.open) == 3)
        assert told == []
        asked[2].cancel()
        await until(lambda: told == [("r1", 2)])
        engine.open[0].set()
        await asked[0]
        engine.open[1].set()
        with pytest.raises(EpisodeFailure, match="odd"):
            await asked[1]
        assert told == [("r1", 2), ("r1", 1), ("r1", 0)]


async def test_a_bug_of_the_engine_is_an_answer() -> None:
    async def broken(asked: TurnRequest) -> Generation:
        raise KeyError("layer 3")

    async with pair(broken) as p:
        with pytest.raises(EpisodeFailure, match="KeyError: 'layer 3'") as raised:
            await (await p.client()).ask(request(0))
        assert raised.value.kind is FailureKind.ENGINE_ERROR


async def test_a_runner_that_died_keeps_nothing_busy() -> None:
    engine = Engine()
    async with pair(engine) as p:
        dead, alive = await p.client(), await p.client()
        lost, kept = p.asked(dead, 0), p.asked(alive, 2)
        await until(lambda: len(engine.open) == 2)
        dead.close()
        await until(lambda: engine.cancelled == [0])
        with pytest.raises(EpisodeFailure):
            await lost
        engine.open[2].set()
        assert (await kept).token_ids.tolist() == [2]


async def test_a_replica_that_died_is_engine_lost() -> None:
    async with pair(Engine()) as p:
        client = await p.client()
        asked = p.asked(client, 0)
        await until(lambda: p.server.running == 1)
        p.server.close()
        for late in (asked, p.asked(client, 2)):
            with pytest.raises(EpisodeFailure, match="replica r1 of the PolicyServer is gone") as raised:
                await late
            assert raised.value.kind is FailureKind.ENGINE_LOST
        assert p.lost == [client]


async def test_a_replica_that_hangs_is_engine_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raygym.turn_client._ASK_EVERY_S", 0.02)
    engine = Engine()
    async with pair(engine) as p:
        client = await p.client()
        received, signs = client.received, list[bytes]()

        def noted(frame: bytes) -> None:
            signs.append(frame)
            received(frame)

        monkeypatch.setattr(client, "received", noted)
        asked = p.asked(client, 0)
        # Slow, but alive: it answers when it is asked, and it is asked again only where it has answered.
        await until(lambda: len(signs) >= 5)
        assert not asked.done() and set(signs) == {b""}
        monkeypatch.setattr("raygym.turn_server._Sender.received", lambda self, frame: None)
        # Only now, or a pause of this machine would be a silence.
        monkeypatch.setattr("raygym.turn_client._SILENT_AFTER_S", 0.2)
        with pytest.raises(EpisodeFailure, match="no sign of life") as raised:
            await asked
        assert raised.value.kind is FailureKind.ENGINE_TIMEOUT and p.lost


async def test_one_that_was_not_listened_to_was_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The EnvRunner's own event loop stood still between its question and the answer."""
    monkeypatch.setattr("raygym.turn_client._ASK_EVERY_S", 0.02)
    monkeypatch.setattr("raygym.turn_client._SILENT_AFTER_S", 2.0)
    engine = Engine()
    async with pair(engine) as p:
        client = await p.client()
        asked = p.asked(client, 0)
        await until(lambda: client._asked_s is not None)
        time.sleep(2.5)
        # As with libuv, which looks at its timers before it reads.
        assert client._watch is not None
        client._watch.cancel()
        client._check_alive()
        assert not p.lost and not asked.done()
        await until(lambda: not client.suspect)


async def test_a_replica_that_hangs_is_noticed_though_its_turns_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a turn's deadline that is shorter than what a busy replica is granted."""
    async with pair(Engine()) as p:
        client = await p.client()
        assert not client.suspect
        monkeypatch.setattr("raygym.turn_client._ASK_EVERY_S", 0.02)
        monkeypatch.setattr("raygym.turn_client._SILENT_AFTER_S", 0.2)
        first = p.asked(client, 0)
        await until(lambda: p.server.running == 1)
        monkeypatch.setattr("raygym.turn_server._Sender.received", lambda self, frame: None)
        number = 2
        async with asyncio.timeout(30):
            while not p.lost:
                first.cancel()
                number, first = number + 2, p.asked(client, number)
                await asyncio.sleep(0.05)
                assert client.suspect or number < 8
        await asyncio.wait([first], timeout=30)  # it has failed, but perhaps not had its turn of the event loop yet
        assert first.done() and client.waiting == 0


async def test_only_who_knows_the_secret_is_served() -> None:
    engine = Engine()
    async with pair(engine) as p:
        stranger = await p.client(secret=bytes(32))
        with pytest.raises(EpisodeFailure, match="gone"):
            await stranger.ask(request(0))
        too_long = await p.client(secret=bytes(10_000))
        with pytest.raises(EpisodeFailure, match="gone"):
            await too_long.ask(request(2))
        assert engine.open == {} and engine.cancelled == []


def test_an_address_does_not_show_its_secret() -> None:
    assert "hush" not in repr(TurnAddress("r", "127.0.0.1", 1, b"hush"))


@settings(max_examples=25)
@given(st.lists(st.binary(max_size=30), max_size=6), st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_frames_survive_any_cut_of_the_stream(frames: list[bytes], cuts: list[int]) -> None:
    class Reader(Frames):
        def __init__(self) -> None:
            super().__init__()
            self.frames: list[bytes] = []

        def received(self, frame: bytes) -> None:
            self.frames.append(frame)

    stream = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)
    reader, at, turn = Reader(), 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        reader.data_received(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert reader.frames == frames


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from("sfc"), min_size=1, max_size=40), st.randoms())
def test_any_order_answers_every_turn_once(events: str, rng: Any) -> None:
    """Start, finish and cancel in any order: every turn that was not cancelled is answered exactly once."""

    async def play() -> None:
        engine = Engine()
        async with pair(engine) as p:
            client = await p.client()
            asked: list[asyncio.Task[Generation]] = []
            for event in events:
                if event == "s":
                    asked.append(p.asked(client, len(asked)))
                elif event == "f" and engine.open:
                    engine.open[rng.choice(sorted(engine.open))].set()
                elif event == "c" and asked:
                    rng.choice(asked).cancel()
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            waiting = [task for task in asked if not task.done()]
            while not all(task.done() for task in waiting):
                for opened in list(engine.open.values()):
                    opened.set()
                await asyncio.sleep(0)
            for number, task in enumerate(asked):
                if task.cancelled():
                    continue
                assert (task.exception() is not None) == (number % 2 == 1)
                assert task.exception() or task.result().token_ids.tolist() == [number]
            await until(lambda: p.server.running == 0)
            assert client.waiting == 0

    asyncio.run(play())
