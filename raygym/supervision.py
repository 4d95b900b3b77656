"""Which parts of a run are lost, how often each kind was, and whether it may be started again. Pure; no IO."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from raygym.supervision_config import SupervisionConfig


class Kind(StrEnum):
    """What is supervised; the values are in metrics' and config's names."""

    LEARNER = "learner"
    MANAGER = "manager"
    REPLICA = "replica"
    ENV_RUNNER = "env_runner"
    WEIGHT_STORE = "weight_store"


class What(StrEnum):
    """What happened to a part."""

    LOST = "lost"
    RESTARTED = "restarted"
    """It runs again, but does not do its work yet."""
    RECOVERED = "recovered"
    GIVEN_UP = "given_up"


class GivenUp(Exception):
    """A part was lost more often than the config allows. The text begins with the cause of the last loss."""


@dataclass(frozen=True, slots=True)
class PartEvent:
    """Something that happened to one part of a run."""

    time_s: float
    """Seconds since the epoch: events are of several processes."""
    kind: Kind
    name: str
    what: What
    cause: str = ""
    recovery_s: float | None = None
    """Seconds from the moment in which the loss was noticed; of `recovered` only."""
    incarnation: str = ""
    """What tells the process that does the work from those before it, where that is known; of `recovered` only."""

    def to_json(self) -> dict[str, Any]:
        """A line of events.jsonl. The time is UTC, in ISO 8601."""
        return {
            "time": datetime.fromtimestamp(self.time_s, UTC).isoformat(timespec="milliseconds"),
            "kind": self.kind.value,
            "name": self.name,
            "what": self.what.value,
            "cause": self.cause,
            "recovery_s": None if self.recovery_s is None else round(self.recovery_s, 3),
        }

    def __str__(self) -> str:
        """For a person."""
        if self.what is What.RECOVERED:
            return f"{self.name} is back after {self.recovery_s:.1f} s; it was lost: {self.cause}"
        told = {What.LOST: "is lost", What.RESTARTED: "was started again", What.GIVEN_UP: "is given up"}[self.what]
        return f"{self.name} {told}" + (f": {self.cause}" if self.cause else "")


class RestartBudget:
    """Losses of one kind within a window."""

    def __init__(self, most: int | None, window_s: float) -> None:
        """Allow `most` of them in any `window_s` seconds; None: any number."""
        self._most = most
        self._window_s = window_s
        self._lost_s: deque[float] = deque()

    def lost(self, now_s: float) -> int | None:
        """Count one more; how many there were, where that is one too many."""
        self._lost_s.append(now_s)
        while self._lost_s[0] <= now_s - self._window_s:
            self._lost_s.popleft()
        return len(self._lost_s) if self._most is not None and len(self._lost_s) > self._most else None

    def reset(self) -> None:
        """What was lost counts no more."""
        self._lost_s.clear()


class Health:
    """What is known of the health of a run's parts. Every method returns what there is to tell."""

    def __init__(self, config: SupervisionConfig, clock: Callable[[], float]) -> None:
        """All are well. `clock`: seconds since the epoch."""
        self._config = config
        self._clock = clock
        self._budgets = {kind: RestartBudget(self._most(kind), config.window_s) for kind in Kind}
        # Of each part that is lost: when that was noticed, and why.
        self._down: dict[tuple[Kind, str], tuple[float, str]] = {}
        self._incarnations: dict[tuple[Kind, str], str] = {}
        self._restarts: Counter[Kind] = Counter()
        self._untold: Counter[Kind] = Counter()
        self._longest_s: float | None = None

    @property
    def down(self) -> list[tuple[Kind, str]]:
        """The parts that are lost now."""
        return list(self._down)

    @property
    def restarts(self) -> dict[str, int]:
        """Losses that were to be made good, of the whole run, by kind; only of kinds that had any."""
        return {kind.value: count for kind, count in sorted(self._restarts.items())}

    def lost(self, kind: Kind, name: str, cause: str, at_s: float | None = None) -> list[PartEvent]:
        """A part is lost, perhaps once more before it had recovered. The last event is `given_up` over the budget.

        Args:
            kind: of the part.
            name: of the part, for people.
            cause: in one line.
            at_s: when it was noticed, if not now.
        """
        now_s = self._now(at_s)
        first_s, _ = self._down.get((kind, name), (now_s, ""))
        self._down[kind, name] = first_s, cause
        events = [PartEvent(now_s, kind, name, What.LOST, cause)]
        if (count := self._budgets[kind].lost(now_s)) is not None:
            return [*events, PartEvent(now_s, kind, name, What.GIVEN_UP, self._over_budget(kind, cause, count))]
        self._restarts[kind] += 1
        self._untold[kind] += 1
        return events

    def restarted(self, kind: Kind, name: str) -> list[PartEvent]:
        """A lost part runs again; of one that is not lost there is nothing to tell."""
        if (kind, name) not in self._down:
            return []
        return [PartEvent(self._now(None), kind, name, What.RESTARTED)]

    def recovered(self, kind: Kind, name: str, at_s: float | None = None, incarnation: str = "") -> list[PartEvent]:
        """A lost part does its work again; of one that is not lost there is nothing to tell.

        Unless it is not the process that did the work before: then it was lost while whoever watches it was lost, too.
        """
        known = self._incarnations.get((kind, name), incarnation)
        if incarnation:
            self._incarnations[kind, name] = incarnation
        if (kind, name) not in self._down:
            if not incarnation or known == incarnation:
                return []
            events = self.lost(kind, name, "it was started anew while nothing watched it", at_s)
            return events if events[-1].what is What.GIVEN_UP else [*events, *self.recovered(kind, name, at_s)]
        now_s = self._now(at_s)
        since_s, cause = self._down.pop((kind, name))
        took_s = max(0.0, now_s - since_s)
        self._longest_s = max(took_s, self._longest_s or 0.0)
        return [PartEvent(now_s, kind, name, What.RECOVERED, cause, took_s)]

    def given_up(self, kind: Kind, name: str, cause: str, at_s: float | None = None) -> list[PartEvent]:
        """One part stays lost, and the run goes on without it."""
        return [PartEvent(self._now(at_s), kind, name, What.GIVEN_UP, cause)]

    def progressed(self, kind: Kind) -> None:
        """The parts of a kind have done what they are for: losses from before count no more."""
        self._budgets[kind].reset()

    def take_metrics(self) -> dict[str, float]:
        """`supervision/<kind>_restarts` and `supervision/recovery_s_max` since the last call; only what there was."""
        metrics = {f"supervision/{kind}_restarts": float(count) for kind, count in sorted(self._untold.items())}
        if self._longest_s is not None:
            metrics["supervision/recovery_s_max"] = self._longest_s
        self._untold.clear()
        self._longest_s = None
        return metrics

    def _now(self, at_s: float | None) -> float:
        return self._clock() if at_s is None else at_s

    def _most(self, kind: Kind) -> int | None:
        most: int | None = getattr(self._config, f"{kind}_restarts")
        return most

    def _over_budget(self, kind: Kind, cause: str, count: int) -> str:
        return (
            f"{cause.rstrip('.')}. It was loss number {count} within {self._config.window_s:g} s, and "
            f"supervision.{kind}_restarts allows {self._most(kind)}"
        )
