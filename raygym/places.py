"""Places for things that run at once: taken in the order of asking, as many as there are at the moment."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Places:
    """A semaphore whose size may change. Used from one event loop."""

    def __init__(self) -> None:
        """No limit yet."""
        self._limit: int | None = None
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """`take` at the beginning, `leave` at the end."""
        await self.take()
        try:
            yield
        finally:
            self.leave()

    async def take(self) -> None:
        """Wait for a place."""
        if self._free() and not self._waiting:
            self._taken += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.leave()  # the place came at the moment of giving up
            raise

    def resize(self, limit: int | None) -> None:
        """So many places from now on, None: as many as are asked for. Who has one keeps it."""
        self._limit = limit
        self._wake()

    def leave(self) -> None:
        """Give a place back."""
        self._taken -= 1
        self._wake()

    def _free(self) -> bool:
        return self._limit is None or self._taken < self._limit

    def _wake(self) -> None:
        while self._waiting and (self._waiting[0].done() or self._free()):
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._taken += 1
                waiter.set_result(None)
