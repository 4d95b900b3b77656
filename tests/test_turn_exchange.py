"""Turns in batches: nothing is changed by packing, each answer is given once, and nobody's requests stay behind."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.mailbox import Mailbox, Mailboxes
from raygym.turn_batch import TurnRequest, pack_answers, pack_turns
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
    unpacked = pack_turns(requests).unpack()
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
    unpacked = pack_answers(given_answers).unpack()
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


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class TestMailbox:
    async def test_each_answer_is_taken_once_and_as_soon_as_it_is_there(self) -> None:
        engine = Engine()
        mailbox = Mailbox(engine)
        mailbox.start([request(0), request(1), request(2)])
        await settle()
        takers = [asyncio.ensure_future(mailbox.take(5.0, 0.0)) for _ in range(2)]
        await settle()
        engine.open[1].set()
        await settle()
        assert [taker.done() for taker in takers] == [True, False]
        assert isinstance(takers[0].result()[1], EpisodeFailure)
        engine.open[0].set()
        engine.open[2].set()
        assert set(await takers[1]) == {0, 2}
        assert await mailbox.take(0.0, 0.0) == {} and mailbox.running == 0

    async def test_lingering_takes_what_comes_at_nearly_the_same_moment(self) -> None:
        engine = Engine()
        mailbox = Mailbox(engine)
        mailbox.start([request(0), request(2)])
        await settle()
        taker = asyncio.ensure_future(mailbox.take(5.0, 0.05))
        engine.open[0].set()
        await settle()
        engine.open[2].set()
        assert set(await taker) == {0, 2}

    async def test_waiting_ends_without_an_answer(self) -> None:
        mailbox = Mailbox(Engine())
        mailbox.start([request(0)])
        assert await mailbox.take(0.01, 0.0) == {}
        assert mailbox.running == 1

    async def test_cancelled_requests_end_in_the_engine_and_give_no_answer(self) -> None:
        engine = Engine()
        mailbox = Mailbox(engine)
        mailbox.start([request(0), request(2)])
        await settle()
        engine.open[2].set()
        await settle()
        mailbox.cancel([0, 2, 77])
        await settle()
        assert engine.cancelled == [0] and mailbox.running == 0
        assert await mailbox.take(0.0, 0.0) == {}

    async def test_a_bug_of_the_engine_is_an_answer(self) -> None:
        async def broken(asked: TurnRequest) -> Generation:
            raise KeyError("layer 3")

        mailbox = Mailbox(broken)
        mailbox.start([request(0)])
        (answer,) = (await mailbox.take(5.0, 0.0)).values()
        assert isinstance(answer, EpisodeFailure) and answer.kind is FailureKind.ENGINE_ERROR
        assert "KeyError: 'layer 3'" in answer.detail

    async def test_a_sender_that_died_keeps_nothing_busy(self) -> None:
        engine = Engine()
        boxes = Mailboxes(engine)
        await boxes.exchange("dead", pack_turns([request(0)]), (), 0.0, 0.0)
        waiting = asyncio.ensure_future(boxes.exchange("alive", pack_turns([request(2)]), (), 5.0, 0.0))
        await settle()
        await asyncio.sleep(0.02)
        boxes.close_abandoned(after_s=0.01)
        await settle()
        assert engine.cancelled == [0]
        engine.open[2].set()
        assert (await waiting).numbers == (2,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("sfct"), min_size=1, max_size=60), st.randoms())
def test_any_order_answers_every_request_once(events: str, rng: Any) -> None:
    """Start, finish, cancel and take in any order: every request that was not cancelled is answered exactly once."""

    async def play() -> None:
        engine = Engine()
        mailbox = Mailbox(engine)
        started, cancelled, answered = 0, set[int](), list[int]()
        for event in events:
            if event == "s":
                mailbox.start([request(started)])
                started += 1
            elif event == "f" and engine.open:
                engine.open[rng.choice(sorted(engine.open))].set()
            elif event == "c" and started:
                number = rng.randrange(started)
                if number not in answered:
                    cancelled.add(number)
                mailbox.cancel([number])
            elif event == "t":
                answered += list(await mailbox.take(0.0, 0.0))
            await settle()
        for event_ in list(engine.open.values()):
            event_.set()
        await settle()
        answered += list(await mailbox.take(0.0, 0.0))
        assert sorted(answered) == sorted(set(range(started)) - cancelled)
        assert mailbox.running == 0

    asyncio.run(play())
