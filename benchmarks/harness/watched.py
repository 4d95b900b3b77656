"""What the processes of a rollout stack hold while it runs, and how many requests the engines have."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType

import psutil
from ray import serve

from raygym.actors import serving
from raygym.actors.policy_server import DEPLOYMENT

_MARKS = (("RolloutManager", "manager"), ("EnvRunner", "runner"), ("PolicyServer", "replica"))
_TIMEOUT_S = 60.0


def processes() -> Iterator[tuple[str, psutil.Process]]:
    """This program and its descendants, each with what it is: manager, runner, replica, driver, other (Ray's own)."""
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue  # it has just ended
        other = "driver" if process.pid == os.getpid() else "other"
        yield next((kind for mark, kind in _MARKS if mark in name), other), process


class Watch:
    """Looks once a second, from a thread of its own, from `with` to its end."""

    def __init__(self, app: str, every_s: float = 1.0) -> None:
        """`app` is the run's name, whose replicas are asked."""
        self._handle = serve.get_deployment_handle(DEPLOYMENT, serving.app_name(app))
        self._every_s = every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._before = _rss_kib()
        self._at_most_requests = self._before
        self._most: dict[str, float] = {}
        self.most_requests = 0
        """Requests that ran in the engines at the same moment, at most."""

    def __enter__(self) -> Watch:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._done.set()
        self._thread.join()

    def grown_kib(self, kind: str) -> float:
        """What a kind of process holds more than before, at the moment of most requests."""
        return self._at_most_requests[kind] - self._before[kind]

    def most_kib(self, kind: str) -> float:
        """What a kind of process held more than before, at most."""
        return self._most[kind] - self._before[kind]

    def _run(self) -> None:
        while True:
            answers = self._handle.broadcast("metrics").results(timeout_s=_TIMEOUT_S)
            requests, now = sum(running for *_, running in answers), _rss_kib()
            self._most = {kind: max(kib, self._most.get(kind, 0.0)) for kind, kib in now.items()}
            if requests > self.most_requests:
                self.most_requests, self._at_most_requests = requests, now
            if self._done.wait(self._every_s):
                return


def _rss_kib() -> dict[str, float]:
    totals: dict[str, float] = {}
    for kind, process in processes():
        with suppress(psutil.Error):  # it has just ended
            totals[kind] = totals.get(kind, 0.0) + process.memory_info().rss / 1024
    return totals
