"""Fault injection: named points in the code, and a plan of what happens at them.

A point is one line, `chaos.at("env.step")`, wherever a fault is worth having. Without a plan it does nothing. A plan is
a JSON file whose path is in the environment variable RAYGYM_CHAOS, which all processes of a run inherit:

    plan = Plan((Fault("env.step", "kill", hit=100), Fault("turn.*", "drop", rate=0.01, times=5)), seed=3)
    subprocess.run(["raygym", "train", ...], env=os.environ | plan.environment(folder / "chaos.json"))
    Claims(folder / "chaos.json.fired").fired()  # what happened, when, to whom

In one process: `with chaos.active(plan, folder): ...`. A fault that the plan has once happens once, in whichever
process comes to it first, however often processes are started again.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from raygym.config_section import ConfigError
from raygym.testing import faults
from raygym.testing.claims import Claims

ENVIRONMENT = "RAYGYM_CHAOS"
FaultKind = Literal["kill", "stop", "slow", "drop", "corrupt", "fill_disk", "exhaust_memory"]
"""See `raygym.testing.faults` for what each does."""


class ChaosPlanError(ConfigError):
    """A plan that cannot be used. The text names the file or the field."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at a point, and when."""

    point: str
    """A name, or a pattern of names such as `disk.*`."""
    kind: FaultKind
    hit: int = 0
    """At so many hits of the point in one process, counted from 1. Either this or `rate`."""
    rate: float = 0.0
    """At each hit with this probability."""
    times: int = 1
    """So often at most, over all processes and restarts."""
    seconds: float = 1.0
    """How long a process is stopped or slow, or the disk full; the disk is full for every process that has the plan."""
    hits: int = 0
    """For `fill_disk`, in place of `seconds`: so many hits in the process that it happened to, the first included."""
    count: int = 1
    """For `corrupt`: so many bytes."""

    def __post_init__(self) -> None:
        problem = ""
        if self.kind not in get_args(FaultKind):
            problem = f"kind: {self.kind!r} is none of {', '.join(get_args(FaultKind))}"
        elif (self.hit > 0) == (self.rate > 0) or self.hit < 0 or not 0 <= self.rate <= 1:
            problem = f"expected either hit (1 or more) or rate (0 to 1), found hit {self.hit} and rate {self.rate}"
        elif min(self.times, self.count) < 1 or self.seconds < 0 or self.hits < 0:
            problem = "expected times and count of 1 or more, seconds and hits of 0 or more"
        if problem:
            raise ChaosPlanError(f"chaos: fault at {self.point!r}: {problem}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The faults of one run."""

    faults: tuple[Fault, ...]
    seed: int = 0
    """Of what is random: the hits of a `rate`, the bytes that `corrupt` flips."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what `save`, or a person, wrote.

        Raises:
            ChaosPlanError: it cannot be read, or is no plan.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(Fault(**fault) for fault in data.pop("faults")), **data)
        except ChaosPlanError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            known = ", ".join(part.name for part in fields(Fault))
            raise ChaosPlanError(
                f"{ENVIRONMENT}: {path} is no plan of faults ({type(error).__name__}: {error}); expected JSON such as "
                f'{{"seed": 0, "faults": [{{"point": "env.step", "kind": "kill", "hit": 3}}]}} with the keys {known}'
            ) from error

    def environment(self, path: Path) -> dict[str, str]:
        """Save it; returns the variable for its processes, which note what happened in `<path>.fired/`."""
        self.save(path)
        return {ENVIRONMENT: str(path.absolute())}


@dataclass(slots=True)
class _Armed:
    """A fault in one process."""

    number: int
    fault: Fault
    rng: random.Random
    hits: int = 0
    full_hits: int = 0


class _Injector:
    """A plan in one process."""

    def __init__(self, plan: Plan, claims: Claims) -> None:
        self._claims = claims
        self._lock = threading.Lock()
        # A process that comes after one that a fault has ended draws other numbers, or it would end at the same hit.
        self._armed = [
            _Armed(number, fault, random.Random(f"{plan.seed} {number} {claims.taken(number)}"))
            for number, fault in enumerate(plan.faults)
        ]

    def hit(self, point: str, data: Any) -> None:
        for armed in self._armed:
            if not fnmatchcase(point, armed.fault.point):
                continue
            with self._lock:
                full = self._is_full(armed)
                fires = not full and self._fires(armed)
            if full:
                raise faults.disk_full(point)
            if fires:
                self._act(armed, point, data)

    def _is_full(self, armed: _Armed) -> bool:
        fault = armed.fault
        if fault.kind != "fill_disk":
            return False
        if fault.hits:
            armed.full_hits -= armed.full_hits > 0
            return armed.full_hits > 0
        return self._claims.seconds_ago(armed.number) < fault.seconds

    def _fires(self, armed: _Armed) -> bool:
        fault = armed.fault
        armed.hits += 1
        due = armed.rng.random() < fault.rate if fault.rate else armed.hits == fault.hit
        if not due or not self._claims.claim(armed.number, fault.times):
            return False
        armed.full_hits = fault.hits
        return True

    def _act(self, armed: _Armed, point: str, data: Any) -> None:
        fault = armed.fault
        lasts = fault.kind in ("stop", "slow") or (fault.kind == "fill_disk" and not fault.hits)
        self._claims.log(point, fault.kind, fault.seconds if lasts else 0.0)
        match fault.kind:
            case "kill":
                faults.kill()
            case "stop":
                faults.stop(fault.seconds)
            case "slow":
                faults.slow(fault.seconds)
            case "drop":
                faults.drop(point)
            case "corrupt":
                faults.corrupt(point, data, fault.count, armed.rng)
            case "fill_disk":
                raise faults.disk_full(point)
            case "exhaust_memory":
                faults.exhaust_memory(point)


# Whether a point has to look any further; and what it then finds, which is read at the first hit.
_armed = ENVIRONMENT in os.environ
_injector: _Injector | None = None
_reading = threading.Lock()


def at(point: str, data: Any = None) -> None:
    """A point at which a fault can happen. Costs nothing worth measuring where there is no plan.

    Args:
        point: its name, `area.what`.
        data: the bytes that are handed over here, as a writable buffer, for `corrupt`.

    Raises:
        ConnectionError: an injected `drop`.
        OSError: an injected `fill_disk` (ENOSPC).
        MemoryError: an injected `exhaust_memory`.
    """
    if _armed:
        _hit(point, data)


def load() -> None:
    """Read the plan now, if there is one. Raises ChaosPlanError where it cannot be used."""
    global _injector
    with _reading:
        if _armed and _injector is None:
            path = Path(os.environ[ENVIRONMENT])
            _injector = _Injector(Plan.load(path), Claims(claims_folder(path)))


def claims_folder(plan: Path) -> Path:
    """Where the processes of a run with this plan note what happened."""
    return plan.with_name(f"{plan.name}.fired")


def inherited(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable that workers of this machine need for the plan of this process; empty where there is none."""
    return {ENVIRONMENT: os.path.abspath(environment[ENVIRONMENT])} if ENVIRONMENT in environment else {}


@contextmanager
def active(plan: Plan, folder: Path) -> Iterator[Claims]:
    """Use a plan in this process, until the block ends.

    Args:
        plan: in place of any other.
        folder: where what happened is noted.
    """
    global _armed, _injector
    before = _armed, _injector
    claims = Claims(folder)
    _injector, _armed = _Injector(plan, claims), True
    try:
        yield claims
    finally:
        _armed, _injector = before


def _hit(point: str, data: Any) -> None:
    if _injector is None:
        load()
    injector = _injector
    if injector is not None:
        injector.hit(point, data)
