"""How long a run took to recover from each fault, from the log of faults and the run's events.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Any

from raygym.testing.claims import Fired

# Whose events tell that a fault is over: by how a fault's point begins, the kind in events.jsonl.
_SUFFERS = {
    "monkey.replica": "replica",
    "replica.": "replica",
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
    """Seconds from each fault to the next event `recovered` of what it hit, by `<what>/<fault's kind>`.

    A fault without such an event is not in it: nobody noticed it, such as a stop that was short.

    Args:
        fired: what happened.
        events: lines of events.jsonl; `time`, `kind` and `what` are used.
    """
    found: dict[str, list[float]] = {}
    for fault in fired:
        suffers = next((kind for begin, kind in _SUFFERS.items() if fault.point.startswith(begin)), None)
        times = [
            datetime.fromisoformat(event["time"]).timestamp()
            for event in events
            if event["what"] == "recovered" and event["kind"].replace(" ", "_").startswith(suffers or "-")
        ]
        later = [time - fault.seconds_since_epoch for time in times if time >= fault.seconds_since_epoch]
        if later:
            found.setdefault(f"{suffers}/{fault.kind}", []).append(min(later))
    return found


def report(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """By kind: how many, p50 and the longest, in seconds."""
    return {
        kind: {"recoveries": len(taken), "p50_s": round(median(taken), 2), "max_s": round(max(taken), 2)}
        for kind, taken in sorted(seconds.items())
    }
