"""The one table: each stated goal, what was measured, and whether it is met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.result import Metric, Result
from harness.units import RATIO

from suite.goals import Goal
from suite.noise import noise_of
from suite.outcomes import Outcome

Verdict = Literal["met", "NOT met", "reported", "not comparable", "not measured"]
HEADER = ("benchmark", "what", "median", "spread", "noise", "goal", "verdict", "issue")
NARROW_HEADER = ("benchmark", "metric", "median", "spread", "noise", "goal", "verdict")
SIMULATED = "~"
"""Before a metric of the narrow table whose engine was simulated."""


@dataclass(frozen=True, slots=True)
class Row:
    """One goal."""

    goal: Goal
    metric: Metric | None
    verdict: Verdict
    why: str = ""
    """Why it was not measured or cannot be compared; or which other run it is of."""

    @property
    def said(self) -> str:
        """The verdict in words."""
        return f"{self.verdict}{f' ({self.why})' if self.why else ''}"

    @property
    def cells(self) -> tuple[str, ...]:
        """As `HEADER` names them."""
        what = f"{self.goal.says}{' (simulated)' if self.goal.simulated else ''}"
        return (self.goal.benchmark, what, *self._figures, self.goal.said or "-", self.said, str(self.goal.issue))

    @property
    def narrow_cells(self) -> tuple[str, ...]:
        """As `NARROW_HEADER` names them, for a terminal."""
        name = f"{SIMULATED if self.goal.simulated else ''}{self.goal.metric}"
        return (self.goal.benchmark, name, *self._figures, self.goal.said or "-", self.said)

    @property
    def _figures(self) -> tuple[str, str, str]:
        if self.metric is None:
            return "-", "-", "-"
        median, noise = number(self.metric.median, self.metric.unit), noise_of(self.goal, self.metric)
        if self.goal.met(self.metric.median) is False and median == number(self.goal.wanted, self.metric.unit):
            # It would read as if it were what is wanted.
            median = number(self.metric.median, self.metric.unit, digits=6)
        return median, spread(self.metric), number(noise)


def rows(
    goals: Iterable[Goal],
    results: Mapping[str, Result],
    outcomes: Mapping[str, Outcome],
    committed: Mapping[str, Result] | None = None,
) -> list[Row]:
    """One for each goal.

    Args:
        goals: all of them.
        results: by benchmark, of this run.
        outcomes: how this run's benchmarks have ended.
        committed: results of a full run, shown and marked where this run has none.
    """
    return [_row(goal, results, outcomes, committed or {}) for goal in goals]


def _row(
    goal: Goal, results: Mapping[str, Result], outcomes: Mapping[str, Outcome], committed: Mapping[str, Result]
) -> Row:
    result = results.get(goal.benchmark)
    metric = result.metric(goal.metric) if result else None
    full = committed.get(goal.benchmark)
    kept = full.metric(goal.metric) if full else None
    if metric is not None and result is not None and not (result.quick and goal.quick_differs and kept):
        if result.quick and goal.quick_differs:
            return Row(goal, metric, "not comparable", goal.quick_differs)
        return Row(goal, metric, _verdict(goal, metric))
    outcome = outcomes.get(goal.benchmark)
    trouble = f"{outcome.status}: {_short(outcome.why)}" if outcome and outcome.status != "done" else ""
    if kept is not None and full is not None:
        of = f"committed run of {full.started[:10]}"
        return Row(goal, kept, _verdict(goal, kept), f"{of}; {trouble}" if trouble else of)
    missing = "" if result is None else "not part of a quick run" if result.quick else "it reports no such metric"
    return Row(goal, None, "not measured", trouble or missing)


def _verdict(goal: Goal, metric: Metric) -> Verdict:
    met = goal.met(metric.median)
    return "reported" if met is None else "met" if met else "NOT met"


def spread(metric: Metric) -> str:
    """A metric's spread; `-` where there is one sample, which has none."""
    return number(metric.spread) if len(metric.samples) > 1 else "-"


def number(value: float | None, unit: str | None = None, digits: int | None = None) -> str:
    """With three or four digits that say something, or so many, and the unit unless it is a ratio's."""
    if value is None:
        return "-"
    if digits is None:
        digits = 4 if abs(value) >= 100 else 3
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return text if unit in (None, RATIO) else f"{text} {unit}"


def as_text(lines: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal; the first line is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = tuple("-" * width for width in widths)
    aligned = [lines[0], rule, *lines[1:]]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in aligned)


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """The same for a page; the first line is the header."""
    marked = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join([marked[0], "|---" * len(lines[0]) + "|", *marked[1:]])


def _short(why: str) -> str:
    return why if len(why) <= 70 else f"{why[:67]}..."
