"""Faults from outside: processes of a run are killed, or stopped and continued, at random moments."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import psutil

from raygym.testing.claims import Claims, Fired

Action = Literal["kill", "stop"]
VICTIMS: Mapping[str, str] = MappingProxyType(
    {
        "replica": "ray::ServeReplica",
        "learner": "ray::LearnerActor",
        "env_runner": "ray::EnvRunner",
        "manager": "ray::RolloutManager",
        "weight_store": "ray::WeightStore",
    }
)
"""What the command lines of a run's processes begin with, by kind."""


class ChaosMonkey:
    """Strikes at the processes below one driver. As a context manager, from a thread of its own until the block ends.

    with subprocess.Popen(["raygym", "train", ...]) as run, ChaosMonkey(run.pid, folder, seed=3):
        run.wait()
    """

    def __init__(
        self,
        driver: int,
        folder: Path,
        *,
        seed: int,
        kinds: Sequence[str] = tuple(VICTIMS),
        actions: Sequence[Action] = ("kill", "stop"),
        every_s: tuple[float, float] = (1.0, 5.0),
        stop_s: float = 2.0,
        strikes: int | None = None,
    ) -> None:
        """Nothing is done yet.

        Args:
            driver: process ID of `raygym train`, on this machine, which must own its cluster.
            folder: where each strike is noted, as `chaos` notes its faults (`Claims(folder).fired()`).
            seed: of kinds, actions, moments and victims.
            kinds: of processes, keys of `VICTIMS`.
            actions: what is done to them.
            every_s: least and most seconds between two strikes.
            stop_s: how long a process is stopped.
            strikes: so many at most; None: any number.

        Raises:
            ValueError: one of `kinds` is unknown.
        """
        if unknown := sorted(set(kinds) - set(VICTIMS)):
            raise ValueError(f"kinds: {unknown[0]!r} is none of {', '.join(VICTIMS)}")
        self._driver = driver
        self._claims = Claims(folder)
        self._draw = random.Random(seed)
        self._kinds, self._actions = tuple(kinds), tuple(actions)
        self._every_s, self._stop_s = every_s, stop_s
        self._left = strikes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-monkey", daemon=True)

    def __enter__(self) -> ChaosMonkey:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def strike(self, kind: str, action: Action) -> Fired | None:
        """Do it now to one process of this kind. Returns what was done; None where there is no such process.

        A process that is stopped is continued before this returns.
        """
        chance = self._draw.random()  # always one number: who was up changes nothing of the strikes after this
        victims = processes(self._driver, VICTIMS[kind])
        if not victims:
            return None
        victim = victims[int(chance * len(victims))]
        fired = self._claims.log(f"monkey.{kind}", action, self._stop_s if action == "stop" else 0.0, victim.pid)
        try:
            if action == "kill":
                victim.send_signal(signal.SIGKILL)
                return fired
            victim.suspend()
            self._ended.wait(self._stop_s)
            victim.resume()
        except psutil.NoSuchProcess:
            pass  # it went by itself
        return fired

    def _run(self) -> None:
        while self._left != 0:
            wait_s = self._draw.uniform(*self._every_s)
            kind, action = self._draw.choice(self._kinds), self._draw.choice(self._actions)
            if self._ended.wait(wait_s):
                return
            if self.strike(kind, action) is not None and self._left is not None:
                self._left -= 1


def processes(driver: int, prefix: str) -> list[psutil.Process]:
    """Those below the process `driver` whose command line begins with `prefix`, the oldest first."""
    found = []
    try:
        below = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for process in below:
        try:
            if " ".join(process.cmdline()).startswith(prefix):
                found.append((process.create_time(), process.pid, process))
        except psutil.Error:
            continue  # it has ended meanwhile
    return [process for *_, process in sorted(found, key=lambda each: each[:2])]
