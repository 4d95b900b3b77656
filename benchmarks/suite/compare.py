"""Whether a new run is worse than the committed one, and whether two runs agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from suite.goals import Goal
from suite.noise import Difference, differences, other_configs
from suite.outcomes import Kept
from suite.table import as_text, number

HEADER = ("benchmark", "metric", "before", "now", "noise", "")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found."""

    text: str
    """A table, and what could not be compared."""
    bad: Sequence[str]
    """Metrics that are worse, or that do not agree."""
    compared: int


def compare(goals: Sequence[Goal], committed: Kept, new: Kept) -> Comparison:
    """Whether a ratio of the new run is worse than the committed one's by more than noise (`suite.noise.noise_of`).

    Only ratios of goals.yaml that say which way is up, since another machine has other seconds; and only where both
    runs had the same config, which a quick run of some benchmarks has not.
    """
    found = [d for d in differences(goals, committed.results(), new.results(), only_ratios=True) if d.goal.up]
    return _told(found, [d.worse for d in found], "WORSE", committed, new)


def agree(goals: Sequence[Goal], first: Kept, second: Kept) -> Comparison:
    """Whether two runs on one machine differ by no more than the noise, in every metric that has one."""
    found = list(differences(goals, first.results(), second.results(), only_ratios=False))
    return _told(found, [not d.agrees for d in found], "APART", first, second)


def _told(found: Sequence[Difference], bad: Sequence[bool], word: str, before: Kept, now: Kept) -> Comparison:
    lines = [
        (
            d.goal.benchmark,
            d.goal.metric,
            number(d.before.median, d.before.unit),
            number(d.now.median, d.now.unit),
            number(d.noise),
            word if wrong else "ok",
        )
        for d, wrong in zip(found, bad, strict=True)
    ]
    text = as_text([HEADER, *lines]) if lines else "nothing to compare: both have run none of the same benchmarks"
    if others := other_configs(before.results(), now.results()):
        text += f"\nnot compared, since their configs differ: {', '.join(others)}"
    wrong_metrics = [d.goal.metric for d, wrong in zip(found, bad, strict=True) if wrong]
    return Comparison(text, wrong_metrics, len(found))
