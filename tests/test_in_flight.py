"""What becomes of running generations at a weight update: finished, restarted, kept, and never forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import in_virtual_time

from raygym.engine import EngineError
from raygym.in_flight import InFlight, OnUpdate

ALWAYS = 60.0


class Engine:
    """Ends a generation when it is told to. A generation is the versions of its first and its last token."""

    def __init__(self) -> None:
        self.version = 0
        self.running: dict[int, asyncio.Future[None]] = {}
        self.started = 0
        self.slow_to_abort = asyncio.Event()
        self.slow_to_abort.set()

    async def generate(self) -> tuple[int, int]:
        self.started += 1
        number, first = self.started, self.version
        self.running[number] = asyncio.get_running_loop().create_future()
        try:
            await self.running[number]
            return first, self.version
        except asyncio.CancelledError:
            await self.slow_to_abort.wait()
            raise
        finally:
            del self.running[number]

    def finish(self, number: int | None = None) -> None:
        for key in [number] if number else list(self.running):
            if not self.running[key].done():
                self.running[key].set_result(None)


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(100_000):  # turns of the event loop: nothing here waits for a clock, which may be a virtual one
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it did not happen")


class Replica:
    """An engine behind the gate."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.in_flight = InFlight()

    def turn(self, **options: Any) -> asyncio.Task[tuple[int, int]]:
        return asyncio.ensure_future(self.in_flight.run(self.engine.generate, **options))

    async def turns(self, count: int, **options: Any) -> list[asyncio.Task[tuple[int, int]]]:
        before = len(self.engine.running)
        asked = [self.turn(**options) for _ in range(count)]
        await until(lambda: len(self.engine.running) == before + count)
        return asked

    async def finish(self, *tasks: asyncio.Task[Any]) -> None:
        def over() -> bool:
            self.engine.finish()
            return all(task.done() for task in tasks)

        await until(over)

    async def update(self, on_update: OnUpdate, timeout_s: float = ALWAYS) -> tuple[int, int]:
        async with self.in_flight.updating(on_update, timeout_s) as update:
            self.engine.version += 1
            await asyncio.sleep(0)
        return update.restarted, update.late


async def test_keep_lets_a_turn_span_versions() -> None:
    replica = Replica()
    turns = await replica.turns(2)
    assert await replica.update("keep") == (0, 0)
    replica.engine.finish()
    assert await asyncio.gather(*turns) == [(0, 1), (0, 1)]


async def test_finish_turn_waits_for_all_and_new_turns_wait_for_the_weights() -> None:
    replica = Replica()
    turns = await replica.turns(2)
    updating = asyncio.ensure_future(replica.update("finish_turn"))
    await asyncio.sleep(0)
    late_comer = replica.turn()
    replica.engine.finish(1)
    assert await turns[0] == (0, 0)
    await asyncio.sleep(0.01)
    assert not updating.done() and len(replica.engine.running) == 1
    replica.engine.finish()
    assert await turns[1] == (0, 0)
    assert await updating == (0, 0)
    await until(lambda: replica.engine.running)
    again = asyncio.ensure_future(replica.update("finish_turn"))
    await asyncio.sleep(0.001)
    assert not again.done(), "the next update waits as well"
    replica.engine.finish()
    assert await late_comer == (1, 1)
    assert await again == (0, 0)


async def test_a_gate_that_closes_again_at_once_lets_nobody_slip_through() -> None:
    replica = Replica()
    async with replica.in_flight.updating("finish_turn", ALWAYS):
        turn = replica.turn()
        await asyncio.sleep(0)
    async with replica.in_flight.updating("finish_turn", ALWAYS):
        await asyncio.sleep(0.001)
        assert replica.engine.running == {}
    await replica.finish(turn)


@in_virtual_time
async def test_finish_turn_keeps_what_is_late() -> None:
    replica = Replica()
    turns = await replica.turns(3)
    replica.engine.finish(2)
    assert await replica.update("finish_turn", 0.01) == (0, 2)
    replica.engine.finish()
    assert await asyncio.gather(*turns) == [(0, 1), (0, 0), (0, 1)]


async def test_restart_turn_begins_again_and_the_caller_does_not_see_it() -> None:
    replica = Replica()
    turns = await replica.turns(3)
    assert await replica.update("restart_turn") == (3, 0)
    await until(lambda: len(replica.engine.running) == 3)
    assert replica.engine.started == 6
    assert not any(turn.cancelling() for turn in turns)
    replica.engine.finish()
    assert await asyncio.gather(*turns) == [(1, 1)] * 3


@in_virtual_time
async def test_one_that_cannot_begin_again_is_waited_for_or_kept() -> None:
    replica = Replica()
    streams = await replica.turns(1, restartable=False)
    await replica.turns(1)
    assert await replica.update("restart_turn") == (1, 0)
    await until(lambda: len(replica.engine.running) == 2)
    assert await replica.update("finish_turn", 0.01) == (0, 2)
    replica.engine.finish()
    assert await streams[0] == (0, 2)


async def test_a_caller_that_gives_up_frees_the_engine_wherever_its_turn_is() -> None:
    replica = Replica()
    running, restarted = await replica.turns(2)
    running.cancel()
    replica.engine.slow_to_abort.clear()
    updating = asyncio.ensure_future(replica.update("restart_turn"))
    await asyncio.sleep(0)
    waiting = replica.turn()
    await asyncio.sleep(0)
    assert not updating.done(), "nothing is loaded before the engine has let go of them"
    waiting.cancel()
    replica.engine.slow_to_abort.set()
    restarted.cancel()  # while it is on its way out for the update
    assert await updating == (0, 0)
    for turn in (running, waiting, restarted):
        with pytest.raises(asyncio.CancelledError):
            await turn
    assert replica.engine.running == {} and replica.engine.started == 2


@in_virtual_time
async def test_a_turn_on_its_way_out_is_not_cancelled_twice() -> None:
    replica = Replica()
    given_up, stopped = await replica.turns(2)
    replica.engine.slow_to_abort.clear()
    given_up.cancel()
    await asyncio.sleep(0.001)
    with pytest.raises(OSError, match="disk"):
        async with replica.in_flight.updating("restart_turn", 0.01) as update:
            assert update.late == 2 and len(replica.engine.running) == 2, "their cleaning up was disturbed"
            raise OSError("disk")
    await asyncio.sleep(0)
    assert len(replica.engine.running) == 2
    replica.engine.slow_to_abort.set()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    with pytest.raises(EngineError, match="disk"):
        await stopped


@in_virtual_time
async def test_a_deadline_of_the_caller_holds_across_a_restart() -> None:
    replica = Replica()

    async def with_deadline() -> tuple[int, int]:
        async with asyncio.timeout(0.05):
            return await replica.in_flight.run(replica.engine.generate)

    turn = asyncio.ensure_future(with_deadline())
    await until(lambda: replica.engine.running)
    assert await replica.update("restart_turn") == (1, 0)
    with pytest.raises(TimeoutError):
        await turn
    assert replica.engine.running == {}


async def test_a_turn_that_is_over_when_the_restart_comes_is_not_lost() -> None:
    replica = Replica()
    (turn,) = await replica.turns(1)
    replica.engine.finish()
    await replica.update("restart_turn")
    await until(lambda: turn.done() or replica.engine.running)
    replica.engine.finish()
    assert await turn in ((0, 0), (1, 1))
    assert turn.cancelling() == 0


async def test_an_engine_that_ends_a_stopped_turn_in_its_own_way() -> None:
    replica = Replica()
    ways: list[Any] = [EngineError("aborted"), "whole"]

    async def stubborn(way: Any) -> str:
        if replica.engine.version:
            return "again"
        try:
            await asyncio.sleep(ALWAYS)
        except asyncio.CancelledError:
            if isinstance(way, Exception):
                raise way from None
        return str(way)

    turns = [asyncio.ensure_future(replica.in_flight.run(lambda way=way: stubborn(way))) for way in ways]
    await asyncio.sleep(0)
    assert await replica.update("restart_turn") == (1, 0)
    assert await asyncio.gather(*turns) == ["again", "whole"]
    assert [turn.cancelling() for turn in turns] == [0, 0]


@pytest.mark.parametrize("on_update", ["keep", "finish_turn", "restart_turn"])
@in_virtual_time
async def test_after_a_failed_load_nobody_waits(on_update: OnUpdate) -> None:
    replica = Replica()
    turns = await replica.turns(2)
    turns += await replica.turns(1, restartable=False)
    late_comers = []
    with pytest.raises(OSError, match="disk"):
        async with replica.in_flight.updating(on_update, 0.01):
            late_comers = [replica.turn(), replica.turn()]
            await asyncio.sleep(0.001)
            raise OSError("disk")
    for turn in (*turns, *late_comers, replica.turn()):
        with pytest.raises(EngineError, match=r"weights are unusable.*OSError: disk"):
            await asyncio.wait_for(turn, 30)
    assert replica.engine.running == {}


@pytest.mark.parametrize("on_update", ["finish_turn", "restart_turn"])
async def test_an_update_given_up_before_the_weights_changed_changes_nothing(on_update: OnUpdate) -> None:
    replica = Replica()
    replica.engine.slow_to_abort.clear()
    (turn,) = await replica.turns(1)
    updating = asyncio.ensure_future(replica.update(on_update))
    await asyncio.sleep(0)
    late_comer = replica.turn()
    updating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await updating
    replica.engine.slow_to_abort.set()
    await replica.finish(turn, late_comer)
    assert await asyncio.gather(turn, late_comer) == [(0, 0), (0, 0)]


async def test_two_updates_at_once_are_refused() -> None:
    replica = Replica()
    await replica.turns(1)
    first = asyncio.ensure_future(replica.update("finish_turn"))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="one version at a time"):
        await replica.update("keep")
    replica.engine.finish()
    assert await first == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["turn", "stream", "finish", "cancel", "update", "step"]), max_size=40),
    st.sampled_from(["keep", "finish_turn", "restart_turn"]),
    st.booleans(),
    st.randoms(),
)
def test_any_order_of_events(events: list[str], on_update: OnUpdate, in_time: bool, rng: Any) -> None:
    """Each turn ends once, with what its policy promises or with its caller's cancel, and nothing is left."""

    async def play() -> None:
        replica = Replica()
        asked: list[tuple[asyncio.Task[tuple[int, int]], bool]] = []
        cancelled: set[asyncio.Task[Any]] = set()
        updates: list[asyncio.Task[tuple[int, int]]] = []
        for event in events:
            if event in ("turn", "stream"):
                asked.append((replica.turn(restartable=event == "turn"), event == "turn"))
            elif event == "finish" and replica.engine.running:
                replica.engine.finish(rng.choice(sorted(replica.engine.running)))
            elif event == "cancel" and asked:
                turn, _ = rng.choice(asked)
                if turn.cancel():
                    cancelled.add(turn)
            elif event == "update" and (not updates or updates[-1].done()):
                updates.append(asyncio.ensure_future(replica.update(on_update, ALWAYS if in_time else 0)))
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)

        await replica.finish(*updates, *(turn for turn, _ in asked))
        for turn, restartable in asked:
            if turn in cancelled:
                assert turn.cancelled()
                continue
            first, last = turn.result()
            if in_time and (on_update == "finish_turn" or (on_update == "restart_turn" and restartable)):
                assert first == last
        assert replica.engine.version == len(updates)
        assert replica.engine.running == {} and replica.in_flight._running == {}
        started = sum(restarted for restarted, _ in (update.result() for update in updates))
        assert replica.engine.started <= len(asked) + started
        assert not any(late for _, late in (update.result() for update in updates)) or not in_time

    asyncio.run(play())
