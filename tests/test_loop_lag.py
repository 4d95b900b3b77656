"""A loop that is blocked is seen to be late."""

import asyncio
import time

from raygym.loop_lag import LoopLag


async def test_a_blocked_loop_is_late() -> None:
    lag = LoopLag()
    lag.start()
    lag.start()
    await asyncio.sleep(0.01)
    time.sleep(0.3)  # blocks the loop, which is the point
    await asyncio.sleep(0.15)
    _, p99 = lag.take()
    assert p99 > 150
    assert lag.take() == (0.0, 0.0)
