"""Which curves a report shows, and few enough points of each for a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raygym.report.columns import Columns, Points

_MOST_POINTS = 240
_MOST_SERIES = 6


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    label: str
    points: Points
    """At most 240, each the mean of the steps up to it."""
    first: float
    last: float
    lowest: float
    highest: float
    """Of single steps, as are those before."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over the same steps, in the same unit."""

    title: str
    unit: str
    series: tuple[Series, ...]


def charts(columns: Columns) -> list[Chart]:
    """Those that say something: no curve without points, and none that is 0 all along."""
    of_envs = "reward/mean/"
    drawn: list[tuple[str, str, list[tuple[str, Points]]]] = [
        ("Reward", "", [("training", columns["reward/mean"]), ("validation", columns["val/reward"])]),
        ("Reward by environment", "", [(n.removeprefix(of_envs), columns[n]) for n in columns.names(of_envs)]),
        ("Entropy", "nats a token", [("entropy", columns["policy/entropy"])]),
        ("Learner and engine differ", "nats a token", [("|log q - log p|", columns["policy/logprob_abs_diff"])]),
        ("KL to the starting policy", "nats a token", [("KL", columns["policy/reference_kl"])]),
        ("Tokens clipped", "share", [("clipped", columns["policy/clip_fraction"])]),
        ("Gradient", "norm", [("gradient", columns["grad/norm"])]),
        ("Length", "tokens an episode", [
            ("generated", columns["length/generated_mean"]), ("trained", columns["length/trained_mean"]),
        ]),
        ("Turns", "an episode", [
            ("training", columns["episodes/turns_mean"]), ("validation", columns["val/turns_mean"]),
        ]),
        ("Generated", "tokens a second", [("generated", columns.ratio("tokens/generated", "time/step_s"))]),
        ("Time of a step", "seconds", [("step", columns["time/step_s"])]),
        ("Failed attempts", "a step", [("failed", columns.summed("episodes/failed/"))]),
        ("Staleness", "versions, at most", [("staleness", columns["policy/staleness_max"])]),
    ]  # fmt: skip
    found = []
    for title, unit, lines in drawn:
        lines = [(label, points) for label, points in lines if any(value for _, value in points)]
        if len(lines) > _MOST_SERIES:
            unit = f"{_MOST_SERIES} of {len(lines)}"
        if lines:
            found.append(Chart(title, unit, tuple(_series(*line) for line in lines[:_MOST_SERIES])))
    return found


def _series(label: str, points: Points) -> Series:
    values = [value for _, value in points]
    return Series(label, thinned(points), values[0], values[-1], min(values), max(values))


def thinned(points: Sequence[tuple[int, float]], most: int = _MOST_POINTS) -> Points:
    """At most so many: each the mean of as many neighbours, at the last one's step."""
    if len(points) <= most:
        return list(points)
    found = []
    for number in range(most):
        part = points[number * len(points) // most : (number + 1) * len(points) // most]
        found.append((part[-1][0], sum(value for _, value in part) / len(part)))
    return found
