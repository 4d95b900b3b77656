"""A call of a library that may hang for ever: it is given up when nothing has come of it for some time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def watched(call: Callable[[], T], idle_s: float, progress: Callable[[], object] = lambda: None) -> T:
    """What `call` returns or raises, in a thread of its own.

    Args:
        call: goes on in its thread after it was given up, and does not keep the process from ending.
        idle_s: seconds without progress after which it is given up.
        progress: changes while it gets on; asked once a second.

    Raises:
        TimeoutError: it was given up.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="watched-call", daemon=True).start()
    seen, since = progress(), time.monotonic()
    while not wait([future], min(1.0, idle_s)).done:
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since >= idle_s:
            raise TimeoutError(f"nothing has come for {idle_s:g} s")
    return future.result()
