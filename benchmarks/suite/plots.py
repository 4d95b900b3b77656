"""Which plots benchmarks/README.md has, and what is in them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from harness.result import Result

from suite.table import Row


@dataclass(frozen=True, slots=True)
class Series:
    """A line: of each x, median, smallest and largest sample."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines over a logarithmic x axis."""

    file: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True)
class Bars:
    """How far each goal was reached or passed: 1 is the goal, to the right is better."""

    file: str
    title: str
    bars: tuple[tuple[str, float], ...]


Plot = Lines | Bars


@dataclass(frozen=True, slots=True)
class _OverX:
    """Lines that are made of one benchmark's metrics, whose names end with what is on the x axis."""

    benchmark: str
    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, str]
    """What the names begin with, by the line's label."""
    x: str = r"(\d+)"
    """The rest of the names."""


_OVER_X = (
    _OverX(
        "serving",
        "Generated tokens a second, SmolLM2",
        "requests at once",
        "tokens/s",
        {
            "plain vllm serve": "vllm_tokens_per_s_",
            "raygym, HTTP": "http_tokens_per_s_",
            "raygym, as episodes ask": "handle_tokens_per_s_",
        },
    ),
    _OverX(
        "rollout",
        "Rollouts on the simulated engine, share of the ideal schedule",
        "episodes at once (turns of 100 ms; of 1,024 episodes 2 s, of 10,000 20 s)",
        "share",
        {"raygym": "efficiency_"},
    ),
    _OverX(
        "nemo_gym",
        "Turns a second, simulated policy of 100 ms",
        "episodes at once",
        "turns/s",
        {"NeMo Gym": "nemo_gym_turns_per_s_", "raygym": "turns_per_s_"},
    ),
    _OverX(
        "scale",
        "Scale on a virtual clock, simulated, max_staleness 1",
        "GPUs' worth of engines",
        "share",
        {"delivered, of the ideal": "share_of_ideal_", "manager, of a core": "manager_share_of_core_"},
        x=r"(\d+)_gpus",
    ),
)


def plots(rows: Sequence[Row], results: Mapping[str, Result]) -> list[Plot]:
    """Those that there is something to draw of."""
    reached = tuple(
        (f"{row.goal.benchmark}: {row.goal.metric}{' (simulated)' if row.goal.simulated else ''}", round(share, 4))
        for row in rows
        if row.metric is not None and row.verdict in ("met", "NOT met") and (share := _reached(row)) is not None
    )
    found: list[Plot] = [Bars("goals.svg", "How many times as good as its goal", reached)]
    for wanted in _OVER_X:
        if (result := results.get(wanted.benchmark)) is not None:
            series = [Series(label, _points(result, prefix, wanted.x)) for label, prefix in wanted.lines.items()]
            drawn = tuple(line for line in series if len(line.points) > 1)
            found.append(Lines(f"{wanted.benchmark}.svg", wanted.title, wanted.x_label, wanted.y_label, drawn))
    return [plot for plot in found if (plot.bars if isinstance(plot, Bars) else plot.series)]


def digest(plot: Plot) -> str:
    """Of all that is drawn."""
    return hashlib.sha256(json.dumps(asdict(plot), sort_keys=True).encode()).hexdigest()


def _points(result: Result, prefix: str, x: str) -> tuple[tuple[float, float, float, float], ...]:
    found: list[tuple[float, float, float, float]] = []
    for name, samples in result.samples.items():
        if match := re.fullmatch(re.escape(prefix) + x, name):
            # Not the rounded median, which may be beyond all samples.
            found.append((float(match[1]), median(samples), min(samples), max(samples)))
    return tuple(sorted(found))


def _reached(row: Row) -> float | None:
    """How many times as good as the goal; None where either is 0."""
    assert row.metric is not None
    value, wanted = row.metric.median, row.goal.wanted
    if not value or not wanted or value < 0:
        return None
    return value / wanted if row.goal.up == "higher" else wanted / value
