"""Places: never more than the limit, in the order of asking, none lost."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.places import Places


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_place_given_at_the_moment_of_giving_up_is_not_lost() -> None:
    places = Places()
    places.resize(1)
    await places.take()
    waiting = asyncio.ensure_future(places.take())
    await settle()
    places.leave()
    waiting.cancel()
    await settle()
    await asyncio.wait_for(places.take(), 30)


async def test_a_lower_limit_holds_for_who_comes_next_and_a_higher_one_lets_in_who_waits() -> None:
    places = Places()
    for _ in range(2):
        await places.take()
    places.resize(1)
    waiting = asyncio.ensure_future(places.take())
    places.leave()
    await settle()
    assert not waiting.done()
    places.resize(3)
    last = asyncio.ensure_future(places.take())
    await settle()
    assert waiting.done() and last.done()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("tlc"), st.integers(1, 4)), max_size=40), st.randoms())
def test_any_order_keeps_the_limit_and_the_queue(events: list[tuple[str, int]], rng: Any) -> None:
    async def play() -> None:
        places, asked, inside, entered = Places(), list[asyncio.Task[None]](), 0, list[int]()

        async def enter(number: int) -> None:
            nonlocal inside
            await places.take()
            entered.append(number)
            inside += 1

        limit = 1
        for event, size in events:
            before, known = inside, len(entered)
            if event == "t":
                limit = size
                places.resize(limit)
                asked.append(asyncio.ensure_future(enter(len(asked))))
            elif event == "l" and inside:
                inside -= 1
                before = inside
                places.leave()
            elif event == "c" and asked:
                rng.choice(asked).cancel()
            await settle()
            assert inside <= max(limit, before)
            # Those let in at the same moment run on in any order.
            entered[known:] = sorted(entered[known:])
        assert entered == sorted(entered)
        while inside:
            inside -= 1
            places.leave()
            await settle()
        assert all(task.done() for task in asked)

    asyncio.run(play())
