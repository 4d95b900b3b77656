"""The table of environments, from what metrics.jsonl says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raygym.report.columns import Columns, Points

_SHARE = 10
"""First and last: the mean over this part of the steps."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One row. None: not known."""

    name: str
    episodes: int
    reward_first: float | None
    reward_last: float | None
    """Means over the first and the last tenth of the steps."""
    turns: float | None
    tokens: float | None
    """Generated, an episode."""
    step_s: float | None
    """Of its `reset` and `step`."""
    failed: int
    """Attempts."""
    own: tuple[tuple[str, float | None, float | None], ...]
    """Its own metrics: name, first, last."""


def environments(columns: Columns, labels: Sequence[str]) -> list[Environment]:
    """One for each of the config's environments. With one alone, the numbers of the whole run are its own."""
    alone = len(labels) == 1
    return [_environment(columns, label, "" if alone else f"/{label}") for label in dict.fromkeys(labels)]


def _environment(columns: Columns, label: str, suffix: str) -> Environment:
    episodes = columns.total(f"episodes/completed{suffix}")
    tokens = columns.total(f"tokens/generated{suffix}")
    first, last = _ends(columns[f"reward/mean{suffix}"])
    prefix = f"env/{label}/"
    own = [name.removeprefix(prefix) for name in columns.names(prefix)]
    return Environment(
        name=label,
        episodes=int(episodes),
        reward_first=first,
        reward_last=last,
        turns=columns.mean(f"episodes/turns_mean{suffix}"),
        tokens=tokens / episodes if episodes and tokens else None,
        step_s=columns.mean(f"{prefix}step_s"),
        failed=int(columns.total(f"{prefix}failed")),
        own=tuple((name, *_ends(columns[prefix + name])) for name in own if name not in ("step_s", "failed")),
    )


def _ends(points: Points) -> tuple[float | None, float | None]:
    """Means over the first and the last tenth."""
    if not points:
        return None, None
    count = max(1, len(points) // _SHARE)
    values = [value for _, value in points]
    return sum(values[:count]) / count, sum(values[-count:]) / count
