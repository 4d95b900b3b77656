"""What each kind of injected fault does to the process that it hits."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from typing import Any

# Continues the process that started it after so many seconds, and ends with it.
_CONTINUE = """
import os, select, signal, sys, time
parent, ends = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while os.getppid() == parent and time.monotonic() < ends:
    time.sleep(0.01)
# Until it says that it goes on: on a busy machine it may not have stopped yet, and nobody else would continue it.
while os.getppid() == parent:
    os.kill(parent, signal.SIGCONT)
    if select.select([0], [], [], 0.05)[0]:
        break
"""
_CHUNK_BYTES = 64 << 20


class Dropped(ConnectionError):
    """An injected loss of a connection, or of the message that was on it."""


def kill() -> None:
    """End this process by SIGKILL, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop(seconds: float) -> None:
    """Stop this process by SIGSTOP, all its threads, for so long.

    A child continues it. The child is no fork of this process, whose locks and open connections it would have, and it
    ends when this process does.
    """
    command = [sys.executable, "-I", "-S", "-c", _CONTINUE, str(os.getpid()), str(seconds)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        os.kill(os.getpid(), signal.SIGSTOP)
        child.communicate(b"\n")


def slow(seconds: float) -> None:
    """Take so much longer. In a coroutine, its whole event loop waits."""
    time.sleep(seconds)


def drop(point: str) -> None:
    """Raises Dropped."""
    raise Dropped(f"chaos: the connection was dropped at {point}")


def corrupt(point: str, data: Any, count: int, rng: random.Random) -> None:
    """Flip one bit in each of `count` bytes of the buffer `data`, where they are.

    Raises:
        ValueError: `data` is no writable contiguous buffer, or has no bytes.
    """
    try:
        view = memoryview(data).cast("B")
    except TypeError:
        view = memoryview(b"")
    if view.readonly or not len(view):
        raise ValueError(
            f"chaos: {point} hands over {type(data).__name__}; corrupt needs a writable contiguous buffer with bytes"
        )
    for at in rng.sample(range(len(view)), min(count, len(view))):
        view[at] ^= 1 << rng.randrange(8)


def disk_full(point: str) -> OSError:
    """The error of a write for which there is no room."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"chaos: {point}")


def exhaust_memory(point: str) -> None:
    """Allocate until nothing more can be had, give it back, and raise MemoryError.

    Really where the process has a limit (RLIMIT_DATA or RLIMIT_AS, as an EnvRunner has): what other threads ask for
    meanwhile is refused as well. Without a limit nothing is allocated, since that would be the whole machine's memory.
    """
    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        held: list[bytearray] = []
        try:
            while True:
                held.append(bytearray(_CHUNK_BYTES))  # zeros that are never touched take no memory of the machine
        except MemoryError:
            held.clear()
    raise MemoryError(f"chaos: no memory is left at {point}")
