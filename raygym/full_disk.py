"""What a run does on a full disk: lines wait for room, whole or not at all; a checkpoint is tried again later."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from raygym.testing import chaos

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TELL_EVERY_S = 5.0


class DiskFull(RuntimeError):
    """There was no room for so long that the run cannot go on. The text says for what, and what to do."""


def is_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, also in another process, is a disk or a quota without room."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        # Libraries that write by Rust's functions, as safetensors does, raise errors of their own.
        if any(f"(os error {number})" in str(seen) for number in _FULL):
            return True
        cause = getattr(seen, "cause", None)  # of an error that comes from another process
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return False


def append_whole(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Append to a file, all of it or nothing: after an error the file is as long as before.

    Args:
        path: the file, which is made if it is needed.
        data: what to append.
        sync: return when it is on the disk. Without, a network's file system may lose it and not say so.

    Raises:
        OSError: it cannot be written; `is_full` tells whether for want of room.
    """
    handle = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    try:
        before = os.fstat(handle).st_size
        try:
            chaos.at("disk.append")
            left = memoryview(data)
            while left:
                left = left[os.write(handle, left) :]  # a disk that is nearly full takes a part
            if sync:
                os.fsync(handle)  # some file systems find out only now that there is no room
        except BaseException:
            os.ftruncate(handle, before)
            raise
    finally:
        with suppress(OSError):  # the line is there: whoever wrote it again would double it
            os.close(handle)


class DiskPatience:
    """Waits for room on the disk, for a bounded time, and says so. Used from any thread."""

    def __init__(
        self,
        wait_s: float,
        told: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Nothing is written yet.

        Args:
            wait_s: how long room is waited for, each time; after the first time in vain not at all.
            told: gets lines for a person.
            clock: seconds.
            sleep: waits so many seconds.
        """
        self._wait_s = wait_s
        self._told = told
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._in_vain = False

    def write(self, what: str, write: Callable[[], None], retry_every_s: float = 0.5) -> None:
        """Call `write` until there is room for it. It must leave nothing half done where there is none.

        Args:
            what: is written, for a person.
            write: what to call.
            retry_every_s: seconds between two calls.

        Raises:
            DiskFull: there is none after `wait_s`.
            OSError: something else is wrong.
        """
        began = self._clock()
        tell_at = began
        while True:
            try:
                write()
                break
            except Exception as error:
                if not is_full(error):
                    raise
            now = self._clock()
            with self._lock:
                if self._in_vain or now - began >= self._wait_s:
                    self._in_vain = True
                    raise DiskFull(
                        f"the disk is full: there was no room for {what} within {self._wait_s:g} s "
                        "(logging.disk_wait_s); make room and start the run again, it goes on from its last checkpoint"
                    ) from None
            if now >= tell_at:
                self._told(f"the disk is full: {what} waits for room ({now - began:.0f} of {self._wait_s:g} s)")
                tell_at = now + _TELL_EVERY_S
            self._sleep(min(retry_every_s, began + self._wait_s - now))
        if tell_at > began:
            self._told(f"there is room on the disk again: {what} was written after {self._clock() - began:.0f} s")

    def attempt(self, what: str, write: Callable[[], None], instead: str) -> bool:
        """Call `write` once; where there is no room, say so and what comes `instead`. Returns whether there was."""
        try:
            write()
        except Exception as error:
            if not is_full(error):
                raise
            self._told(f"the disk is full: {what} was not written; {instead}")
            return False
        return True
