"""Calls of all replicas of a Serve deployment, each with its own answer as soon as it is there."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle


def call_replicas(
    handle: DeploymentHandle[Any], method: str, *args: Any, timeout_s: float, tick_s: float | None = None
) -> Iterator[Any]:
    """Call a method on every replica that Serve lists; yields answers as they come, errors as values.

    One that gives no answer in `timeout_s` is a TimeoutError; where Serve lists none, nothing comes. With `tick_s`,
    None comes whenever there was no answer for so long. Whoever stops reading waits for nobody.
    """
    deadline = time.monotonic() + timeout_s
    try:
        # Serve's public way to the answers waits for all of them, and a stopped replica would delay the others'.
        calls = handle.broadcast(method, *args)._fetch_replica_results_sync(timeout_s)
    except (DeploymentUnavailableError, TimeoutError):
        return
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def wait(call: Any) -> None:
        try:
            answers.put(call.get(max(0.0, deadline - time.monotonic())))
        except Exception as error:
            answers.put(error)

    for call in calls:
        threading.Thread(target=wait, args=(call,), name=f"{method} of a replica", daemon=True).start()
    waiting = len(calls)
    while waiting:
        try:
            yield answers.get(timeout=tick_s)
        except queue.Empty:
            yield None
        else:
            waiting -= 1
