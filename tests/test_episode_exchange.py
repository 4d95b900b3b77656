"""Episodes between manager and runner: each has one outcome, whatever is lost, and none is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import played

from raygym.episode_exchange import Client, EpisodeClient, EpisodeRequest, EpisodeServer, EpisodesLost, Finished
from raygym.schedule import Assignment
from raygym.types import EpisodeFailure, FailureKind, Sampling, Task, Trajectory


class Runner:
    """Plays until it is told how an episode ends, by its number within the group. It can be out of reach."""

    def __init__(self) -> None:
        self.playing: dict[int, asyncio.Future[Any]] = {}
        self.ended: list[int] = []
        self.server = EpisodeServer(self.run)
        self.calls = 0
        self.down: Exception | None = None

    async def run(self, asked: EpisodeRequest) -> Trajectory:
        future = self.playing[asked.episode] = asyncio.get_running_loop().create_future()
        try:
            reward = await future
        except asyncio.CancelledError:
            self.ended.append(asked.episode)
            raise
        finally:
            del self.playing[asked.episode]
        trajectory = played(Assignment(asked.group_id, asked.task, asked.episode, asked.attempt), reward)
        if reward == -1:
            trajectory.metrics["lock"] = threading.Lock()  # type: ignore[assignment]
        return trajectory

    async def exchange(
        self, client: Client, begin: Sequence[EpisodeRequest], cancelled: Sequence[int], wait_s: float
    ) -> Finished:
        self.calls += 1
        if self.down is not None:
            raise self.down
        finished = await self.server.exchange(client, begin, cancelled, wait_s)
        if self.down is not None:
            raise self.down
        return finished

    def client(self, generation: int = 0) -> EpisodeClient:
        return EpisodeClient(self.exchange, generation)


def asked(client: EpisodeClient, episode: int) -> asyncio.Task[Any]:
    return asyncio.ensure_future(client.play(Task(0, "a", 3), "g", episode, 0, Sampling(), 8))


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_ends_and_what_begins_in_its_place_share_a_call() -> None:
    runner = Runner()
    client = runner.client()

    async def one_after_the_other(place: int) -> list[float]:
        return [(await client.play(Task(0, "a", 3), "g", 10 * place + i, 0, Sampling(), 8)).reward for i in range(5)]

    places = [asyncio.ensure_future(one_after_the_other(place)) for place in range(8)]
    for step in range(5):
        now = {10 * place + step for place in range(8)}
        await until(lambda now=now: set(runner.playing) == now)
        assert runner.calls == step + 1, "one call tells the last ends and brings the next episodes"
        for episode, future in list(runner.playing.items()):
            future.set_result(episode)
    assert await asyncio.gather(*places) == [[10 * place + i for i in range(5)] for place in range(8)]
    assert client.playing == 0 and runner.playing == {}


async def test_a_runner_hears_from_which_attempt_seeds_are_counted() -> None:
    runner = Runner()
    heard: list[tuple[int, int]] = []

    async def run(asked: EpisodeRequest) -> Trajectory:
        heard.append((asked.attempt, asked.first_attempt))
        return played(Assignment(asked.group_id, asked.task, asked.episode, asked.attempt))

    runner.server = EpisodeServer(run)
    await EpisodeClient(runner.exchange, 2, 8).play(Task(0, "a", 3), "g", 0, 9, Sampling(), 8)
    assert heard == [(9, 8)]


async def test_failures_keep_their_kind_and_one_that_cannot_be_sent_hurts_no_other() -> None:
    runner = Runner()
    client = runner.client()
    episodes = [asked(client, i) for i in range(4)]
    await until(lambda: len(runner.playing) == 4)
    runner.playing[0].set_exception(EpisodeFailure(FailureKind.CANCELLED, "its RolloutManager is gone"))
    runner.playing[1].set_exception(KeyError("dice"))
    runner.playing[2].set_result(-1)
    runner.playing[3].set_result(0.5)
    cancelled, raised, unsent, fine = await asyncio.gather(*episodes)
    assert cancelled.kind is FailureKind.CANCELLED and "is gone" in cancelled.detail
    assert raised.kind is FailureKind.ENV_ERROR and "KeyError: 'dice'" in raised.detail
    assert unsent.kind is FailureKind.ENV_ERROR and "cannot be sent: TypeError" in unsent.detail
    assert fine.reward == 0.5


async def test_cancelled_episodes_end_in_the_runner() -> None:
    runner = Runner()
    client = runner.client()
    first, second, at_once = asked(client, 0), asked(client, 1), asked(client, 2)
    await asyncio.sleep(0)
    at_once.cancel()
    await until(lambda: len(runner.playing) == 2)
    first.cancel()
    await until(lambda: 0 in runner.ended)
    runner.playing[1].set_result(1.0)
    assert (await second).reward == 1.0 and client.playing == 0


async def test_thousands_that_begin_at_once_let_others_have_their_turn() -> None:
    runner = Runner()
    client = runner.client()
    episodes = [asked(client, i) for i in range(2000)]
    seen = set()
    while len(runner.playing) < 1000:
        seen.add(len(runner.playing))
        await asyncio.sleep(0)
    assert len(seen) > 10
    last = episodes[-1]
    last.cancel()  # it has not begun yet
    await until(lambda: len(runner.playing) == 1999)
    assert runner.ended == []
    for future in runner.playing.values():
        future.set_result(1.0)
    assert {t.reward for t in await asyncio.gather(*episodes[:-1])} == {1.0}
    assert last.cancelled() and client.playing == 0


async def test_a_lost_runner_loses_its_episodes_and_takes_new_ones_when_it_is_back() -> None:
    runner = Runner()
    client = runner.client()
    episodes = [asked(client, i) for i in range(3)]
    await until(lambda: len(runner.playing) == 3)
    runner.down = ConnectionError("the node is gone\nits properties")
    runner.playing[0].set_result(1.0)
    for episode in episodes:
        with pytest.raises(EpisodesLost, match=r"^the node is gone$"):
            await episode
    with pytest.raises(EpisodesLost):
        await asked(client, 3)
    runner.down = None
    # It was only out of reach: what it still plays is ended, and answers of before are nobody's.
    again = asked(client, 4)
    await until(lambda: 4 in runner.playing)
    runner.playing[4].set_result(2.0)
    assert (await again).reward == 2.0
    assert client.playing == 0


async def test_a_successor_ends_the_episodes_of_its_predecessor_which_cannot_come_back() -> None:
    runner = Runner()
    old, new = runner.client(0), runner.client(1)
    lost = asked(old, 0)
    await until(lambda: 0 in runner.playing)
    kept = asked(new, 1)
    await until(lambda: runner.ended == [0] and 1 in runner.playing)
    late = asked(old, 2)  # it was on its way when its manager died
    await asyncio.sleep(0.01)
    assert set(runner.playing) == {1} and runner.ended == [0]
    runner.playing[1].set_result(1.0)
    assert (await kept).reward == 1.0
    lost.cancel()
    late.cancel()


async def test_an_answer_that_nobody_gets_does_not_take_the_next_ones() -> None:
    """A call that its client gave up still waits in the runner."""
    runner = Runner()
    client = Client(0)
    request = EpisodeRequest(1, Task(0, "a", 3), "g", 0, 0, Sampling(), 8)
    stale = asyncio.ensure_future(runner.server.exchange(client, [request], [], 20))
    await until(lambda: 0 in runner.playing)
    current = asyncio.ensure_future(runner.server.exchange(client, [], [], 20))
    assert await stale == []
    runner.playing[0].set_result(1.0)
    assert [number for number, _ in await current] == [1]
    assert await runner.server.exchange(client, [], [], 0.001) == [], "nothing yet: it waits no longer than it is told"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("ssfcd"), min_size=1, max_size=40), st.randoms())
def test_in_any_order_every_episode_has_one_outcome(events: str, rng: Any) -> None:
    """Start, finish, cancel, and a runner that is out of reach for a moment."""

    async def play() -> None:
        runner = Runner()
        client = runner.client()
        episodes: list[asyncio.Task[Any]] = []
        for event in events:
            if event == "s":
                episodes.append(asked(client, len(episodes)))
            elif event == "f" and (open_ones := [f for f in runner.playing.values() if not f.done()]):
                rng.choice(open_ones).set_result(1.0)
            elif event == "c" and episodes:
                rng.choice(episodes).cancel()
            elif event == "d":
                runner.down = ConnectionError("gone")
                await asyncio.sleep(0)
                runner.down = None
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        async with asyncio.timeout(60):
            while not all(episode.done() for episode in episodes):
                for future in list(runner.playing.values()):
                    if not future.done():
                        future.set_result(1.0)
                await asyncio.sleep(0)
        for number, episode in enumerate(episodes):
            if episode.cancelled():
                continue
            if (error := episode.exception()) is not None:
                assert isinstance(error, EpisodesLost)
            else:
                assert (episode.result().episode, episode.result().reward) == (number, 1.0)
        assert client.playing == 0
        # What was lost is ended with the next episode at the latest.
        last = asked(client, len(episodes))
        await until(lambda: set(runner.playing) == {len(episodes)})
        runner.playing[len(episodes)].set_result(1.0)
        await last

    asyncio.run(play())


class Unreadable:
    """Can be sent, but not read."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return int, ("no number",)


async def test_a_record_that_cannot_be_read_fails_alone() -> None:
    class Odd(Runner):
        async def run(self, asked: EpisodeRequest) -> Trajectory:
            trajectory = await super().run(asked)
            if asked.episode == 0:
                trajectory.metrics["odd"] = Unreadable()  # type: ignore[assignment]
            return trajectory

    runner = Odd()
    client = runner.client()
    episodes = [asked(client, episode) for episode in range(3)]
    await until(lambda: len(runner.playing) == 3)
    for future in runner.playing.values():
        future.set_result(1.0)
    first, *others = await asyncio.wait_for(asyncio.gather(*episodes), 60)
    assert isinstance(first, EpisodeFailure) and first.kind is FailureKind.ENV_ERROR and "cannot be read" in str(first)
    assert [outcome.reward for outcome in others] == [1.0, 1.0]


async def test_who_is_cancelled_twice_closes_in_peace() -> None:
    begun, closing, may_close, closed = (asyncio.Event() for _ in range(4))

    async def run(request: EpisodeRequest) -> Trajectory:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            closing.set()
            await may_close.wait()
            closed.set()
        raise AssertionError

    server = EpisodeServer(run)
    request = EpisodeRequest(1, Task(0, "a", 3), "g", 0, 0, Sampling(), 8)
    await server.exchange(Client(0), [request], [], 0.0)
    await asyncio.wait_for(begun.wait(), 60)
    await server.exchange(server._client, [], [1], 0.0)
    await asyncio.wait_for(closing.wait(), 60)
    await server.exchange(Client(1), [], [], 0.0)
    await asyncio.sleep(0.01)  # a second cancel would have arrived
    may_close.set()
    await asyncio.wait_for(closed.wait(), 20)
