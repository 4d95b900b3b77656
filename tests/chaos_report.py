"""How long a run took to recover from each fault, from the log of faults and the run's events.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Any

from raygym.testing.claims import Fired

# Whose events tell that a fault is over: by how a fault's point begins, the kind in events.jsonl.
_SUFFERS = {
    "monkey.replica": "replica",
    "replica.": "replica",
    "sync.bucket": "learner",  # learner 0 packs it
    "sync.": "replica",
    "monkey.learner": "learner",
    "learner.": "learner",
    "monkey.manager": "manager",
    "manager.": "manager",
    "monkey.env_runner": "env_runner",
    "episode.": "env_runner",
    "monkey.weight_store": "weight_store",
}


def recoveries(fired: Sequence[Fired], events: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds from each fault to the end of the loss that it caused, by `<what>/<fault's kind>`.

    That is the first event `recovered` after the first event `lost` after the fault. A fault is not in it that has none
    before the next fault of the same part: nobody noticed it, such as a stop that was short.

    Args:
        fired: what happened.
        events: lines of events.jsonl; `time`, `kind` and `what` are used.
    """
    found: dict[str, list[float]] = {}
    for fault in fired:
        suffers, at_s = _suffers(fault), fault.seconds_since_epoch
        if suffers is None:
            continue
        next_s = min(
            (other.seconds_since_epoch for other in fired if _suffers(other) == suffers and _after(other, fault)),
            default=math.inf,
        )
        lost_s = min((time for time in _times(events, suffers, "lost") if at_s <= time < next_s), default=None)
        if lost_s is not None:
            later = [time - at_s for time in _times(events, suffers, "recovered") if time >= lost_s]
            if later:
                found.setdefault(f"{suffers}/{fault.kind}", []).append(min(later))
    return found


def _suffers(fault: Fired) -> str | None:
    return next((kind for begin, kind in _SUFFERS.items() if fault.point.startswith(begin)), None)


def _after(other: Fired, fault: Fired) -> bool:
    return other.seconds_since_epoch > fault.seconds_since_epoch


def _times(events: Sequence[Mapping[str, Any]], kind: str, what: str) -> list[float]:
    of_kind = (event for event in events if event["kind"].replace(" ", "_").startswith(kind))
    return [datetime.fromisoformat(event["time"]).timestamp() for event in of_kind if event["what"] == what]


def report(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """By kind: how many, p50 and the longest, in seconds."""
    return {
        kind: {"recoveries": len(taken), "p50_s": round(median(taken), 2), "max_s": round(max(taken), 2)}
        for kind, taken in sorted(seconds.items())
    }
