"""The gate of a replica that may serve only with current weights: turns pass it on the way in and on the way out."""

from __future__ import annotations

import asyncio

from raygym.engine import EngineError
from raygym.lease import Beat, Lease

_WAIT_S = 60.0


class FencedError(EngineError):
    """This replica missed a version, or waits for one; whoever asked it should ask another."""


class Admission:
    """Used from one event loop.

    Without a lease turns wait: the driver may only be late. What is in hand when the driver fences the replica fails,
    since it belongs to weights that are not current any more.
    """

    def __init__(self, replica: str, lease: Lease) -> None:
        """`replica` is its name in beats."""
        self._replica = replica
        self._lease = lease
        self._changed = asyncio.Event()
        self._last_beat = 0
        self._fences = 0
        self._fenced = False

    @property
    def admitted(self) -> bool:
        """Whether turns pass now."""
        return self._lease.valid

    @property
    def ended_s(self) -> float:
        """See `Lease`."""
        return self._lease.ended_s

    @property
    def fenced(self) -> bool:
        """It was fenced, and not granted anything since."""
        return self._fenced

    def beat(self, beat: Beat) -> bool:
        """Take a grant, or be fenced. Whether it was fenced by this."""
        if beat.number <= self._last_beat:
            return False
        self._last_beat = beat.number
        since_s = beat.granted.get(self._replica)
        if since_s is not None:
            self._lease.renew(since_s, beat.lease_s)
            self._fenced = self._fenced and not self._lease.valid
            self._tell()
        elif self._replica in beat.fenced:
            self.fence()
            return True
        return False

    def fence(self) -> None:
        """What is in hand fails, and what comes waits for the next grant."""
        self._lease.end()
        self._fences += 1
        self._fenced = True
        self._tell()

    async def enter(self) -> int:
        """Wait until it may serve. Returns what `leave` wants.

        Raises:
            FencedError: it was fenced meanwhile, or was granted nothing for a minute.
        """
        fences = self._fences
        await self._pass(fences)
        return fences

    async def leave(self, fences: int) -> None:
        """Wait until the answer may be given. Raises as `enter` does."""
        await self._pass(fences)

    async def _pass(self, fences: int) -> None:
        if self._lease.valid and fences == self._fences:
            return
        try:
            async with asyncio.timeout(_WAIT_S):
                while fences == self._fences and not self._lease.valid:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise FencedError(
                f"replica {self._replica} was not confirmed to hold the current weights for {_WAIT_S:g} s"
            ) from error
        if fences != self._fences:
            raise FencedError(f"replica {self._replica} was fenced, since it had missed new weights")

    def _tell(self) -> None:
        self._changed.set()
