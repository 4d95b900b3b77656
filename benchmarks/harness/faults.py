"""Faults of whole processes at seeded moments: killed, or stopped for a while as one that hangs is."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

# What stands in the name that Ray gives to an actor's process.
MARKS = {"replica": ":PolicyServer", "runner": "ray::EnvRunner", "manager": "ray::TimedManager"}
_FOUND_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One process that is hurt."""

    at_s: float
    """After the start of the rollouts."""
    victim: str
    """A key of MARKS."""
    hung_s: float = 0.0
    """How long it is stopped; 0: it is killed."""


def draw_faults(seed: int, seconds: float, hung_s: float) -> list[Fault]:
    """One of each kind, at moments of a run that takes `seconds` without them; the same for the same seed."""
    rng = random.Random(seed)
    victims = [("replica", 0.0), ("replica", hung_s), ("runner", 0.0), ("manager", 0.0)]
    return sorted((Fault(rng.uniform(0.1, 0.8) * seconds, *victim) for victim in victims), key=lambda f: f.at_s)


def processes(kind: str) -> list[psutil.Process]:
    """Those of a kind among this program's own descendants, by pid."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if MARKS[kind] in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


class Injector:
    """Hurts one process after the other, from a thread of its own, until all faults are done or it is told to stop."""

    def __init__(self, faults: Sequence[Fault], seed: int) -> None:
        """`seed` draws which process of a kind is hurt."""
        self._faults = list(faults)
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-injector", daemon=True)
        self._stopped: list[tuple[float, psutil.Process]] = []
        self.done: list[Fault] = []
        """Those that hit a process."""

    def start(self) -> None:
        """The rollouts begin now."""
        self._thread.start()

    def stop(self) -> None:
        """No more faults; whatever was stopped goes on when its time is over. Blocks until then."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        for fault in self._faults:
            while not self._stop.wait(min(0.1, max(0.0, started + fault.at_s - time.monotonic()))):
                self._wake()
                if time.monotonic() >= started + fault.at_s:
                    self._hurt(fault)
                    break
        while self._stopped:
            time.sleep(0.1)
            self._wake()

    def _hurt(self, fault: Fault) -> None:
        deadline = time.monotonic() + _FOUND_WITHIN_S
        stopped = {process.pid for _, process in self._stopped}
        while not (found := [p for p in processes(fault.victim) if p.pid not in stopped]):
            assert time.monotonic() < deadline, f"no process of a {fault.victim} within {_FOUND_WITHIN_S:.0f} s"
            time.sleep(0.1)
        process = self._rng.choice(found)
        if fault.hung_s:
            os.kill(process.pid, signal.SIGSTOP)
            self._stopped.append((time.monotonic() + fault.hung_s, process))
        else:
            os.kill(process.pid, signal.SIGKILL)
        self.done.append(fault)

    def _wake(self) -> None:
        for until_s, process in list(self._stopped):
            if time.monotonic() >= until_s:
                self._stopped.remove((until_s, process))
                with suppress(psutil.NoSuchProcess):  # Serve may have replaced it meanwhile
                    process.send_signal(signal.SIGCONT)
