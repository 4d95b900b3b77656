"""Leases: a replica serves only while the driver has lately confirmed that it holds the current weights.

The driver beats. Each replica answers with the time of its own clock, and a later beat grants it a lease that counts
from that time. So clocks need not agree, and a grant that waited in the queue of a stopped process has run out when it
is read at last. The driver knows an upper bound of every lease that it gave: when that has passed, a replica that is
silent serves nothing, whatever has become of it. (C. Gray and D. Cheriton, Leases, SOSP 1989.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from raygym.weights import WeightsId

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What one replica says of itself."""

    replica: str
    """Its name in the application; a successor has another one."""
    node: str
    """Ray's ID of the node that it is on."""
    weights: WeightsId
    clock_s: float
    """Of its own clock, when it said so."""
    admitted: bool = True
    """It holds a lease."""
    ended_s: float = -math.inf
    """Of its own clock, when it ended its lease itself; grants from before count no more."""
    fenced: bool = False
    """It did so, and was granted nothing since."""
    pid: int = 0
    first_token_at: float | None = None
    """When its engine made its first token, in seconds since the epoch; None before that."""
    broken: str = ""
    """Why it will never serve again and waits to be replaced; empty where it works."""

    @property
    def weight_version(self) -> int:
        """The version that it would serve."""
        return self.weights.version


@dataclass(frozen=True, slots=True)
class Beat:
    """What the driver tells all replicas at regular times."""

    number: int
    """Rising: what comes after a later one is ignored."""
    lease_s: float
    granted: Mapping[str, float] = field(default_factory=dict)
    """Replica -> the time of its clock from which its lease counts."""
    fenced: Collection[str] = ()
    """Replicas that missed a version: what they have in hand is not waited for any more."""


class Lease:
    """A replica's own end. Not needed by a replica that nobody trains: it always holds one."""

    def __init__(self, needed: bool, clock: Clock = time.monotonic) -> None:
        self._until_s = -math.inf if needed else math.inf
        self._ended_s = -math.inf
        self._clock = clock

    @property
    def ended_s(self) -> float:
        """When `end` was called last."""
        return self._ended_s

    @property
    def valid(self) -> bool:
        """Whether it may serve now."""
        return self._clock() < self._until_s

    def renew(self, since_s: float, lease_s: float) -> None:
        """A grant: it may serve until `lease_s` after `since_s` of its own clock."""
        if since_s > self._ended_s:
            self._until_s = max(self._until_s, since_s + lease_s)

    def end(self) -> None:
        """It may not serve until a grant that counts from later than now."""
        self._until_s, self._ended_s = -math.inf, self._clock()


@dataclass(slots=True)
class _Member:
    state: ReplicaState
    heard_s: float
    may_serve_until_s: float = -math.inf
    granted_since_s: float = -math.inf
    """Of its clock; of the last grant."""
    fenced: bool = False
    serving: bool = False


class LeaseBook:
    """The driver's end: who was heard when, who was granted what, who is fenced. Not thread-safe."""

    def __init__(self, lease_s: float, clock: Clock = time.monotonic) -> None:
        """Nobody is known yet; current are the files that the engines were started from."""
        self.lease_s = lease_s
        self.weights = WeightsId()
        """The current ones."""
        self.epoch = 0
        """Of the membership: one more with each replica that is admitted or fenced."""
        self._replaced: WeightsId | None = None
        self._clock = clock
        self._beats = 0
        self._members: dict[str, _Member] = {}

    def updating(self, weights: WeightsId) -> None:
        """These become current. Those before them are served, too, until `updated`."""
        self._replaced, self.weights = self.weights, weights

    def updated(self) -> None:
        """From now on only replicas that hold the current weights are granted anything."""
        self._replaced = None

    def beat(self) -> Beat:
        """The next beat, with a grant for each replica that may go on."""
        self._beats += 1
        granted = {}
        for name, member in self._members.items():
            if self._is_silent(member) or not self._may_go_on(member):
                continue
            granted[name] = member.state.clock_s
            # It read its clock before it was heard, so its lease ends before this.
            member.may_serve_until_s = max(member.may_serve_until_s, member.heard_s + self.lease_s)
            member.granted_since_s = member.state.clock_s
            member.fenced = False
        fenced = tuple(name for name, member in self._members.items() if member.fenced)
        return Beat(self._beats, self.lease_s, granted, fenced)

    def heard(self, state: ReplicaState) -> bool:
        """A replica has answered. Whether it was admitted by that."""
        member = self._members.setdefault(state.replica, _Member(state, -math.inf))
        if state.clock_s < member.state.clock_s:  # an answer that was overtaken
            return False
        member.state, member.heard_s = state, self._clock()
        if state.ended_s >= member.granted_since_s:  # not where a later grant is on its way
            member.may_serve_until_s = -math.inf
        admitted = state.admitted and state.weights == self.weights and not member.serving
        member.serving |= admitted
        self.epoch += admitted
        return admitted

    def fence(self, name: str) -> bool:
        """It has missed a version, or is gone. Whether it served until now."""
        member = self._members[name]
        served, member.serving = member.serving, False
        # One that was never admitted has nothing in hand.
        member.fenced = served or member.fenced
        self.epoch += served
        return served

    def forget(self, name: str) -> None:
        """Serve has replaced it."""
        self._members.pop(name, None)

    def admitted(self) -> set[str]:
        """All that were admitted and not fenced since."""
        return {name for name, member in self._members.items() if member.serving}

    def answering(self) -> set[str]:
        """Names of those that were heard within a lease."""
        return {member.state.replica for member in self._answering()}

    def known(self) -> list[str]:
        """All that were ever heard and not forgotten."""
        return list(self._members)

    def silent_s(self, name: str) -> float:
        """How long ago it was heard."""
        return self._clock() - self._members[name].heard_s

    def stood_still(self, seconds: float) -> None:
        """Nobody was asked for so long, so nobody was silent."""
        for member in self._members.values():
            member.heard_s += seconds

    def silent(self) -> list[str]:
        """Replicas that were not heard for as long as a lease, or have said that they will never serve again."""
        return [name for name, member in self._members.items() if self._is_silent(member)]

    def why_silent(self, name: str) -> str:
        """Of one of them, behind its name."""
        broken = self._members[name].state.broken
        return f"waits to be replaced: {broken}" if broken else f"gave no answer for {self.lease_s:g} s"

    def may_serve_until_s(self, name: str) -> float:
        """By the book's clock, the end of the last lease that it was given."""
        return self._members[name].may_serve_until_s

    def may_serve(self) -> set[str]:
        """Replicas whose last lease may still be valid."""
        return {name for name, member in self._members.items() if self._clock() < member.may_serve_until_s}

    def current(self) -> list[ReplicaState]:
        """Replicas that answer and hold the current weights."""
        return [m.state for m in self._answering() if m.state.weights == self.weights]

    def behind(self) -> list[ReplicaState]:
        """Replicas that answer and hold others."""
        return [m.state for m in self._answering() if m.state.weights != self.weights]

    def serving(self) -> list[ReplicaState]:
        """Replicas that answer, hold the current weights and are admitted."""
        return [m.state for m in self._answering() if m.state.weights == self.weights and m.state.admitted]

    def nodes(self) -> set[str]:
        """Those that a replica which answers is on."""
        return {member.state.node for member in self._answering()}

    def _answering(self) -> list[_Member]:
        return [member for member in self._members.values() if not self._is_silent(member)]

    def _may_go_on(self, member: _Member) -> bool:
        if member.state.weights == self.weights:
            return True
        return member.state.weights == self._replaced and not (member.fenced or member.state.fenced)

    def _is_silent(self, member: _Member) -> bool:
        return bool(member.state.broken) or self._clock() - member.heard_s > self.lease_s
