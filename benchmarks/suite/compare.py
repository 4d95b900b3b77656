"""Whether a new run is worse than the committed one, and whether two runs agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.result import Result

from suite.goals import Goal
from suite.noise import Difference, differences, not_any_more, other_configs
from suite.outcomes import Kept
from suite.table import as_text, number

HEADER = ("benchmark", "metric", "before", "now", "noise", "")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found."""

    text: str
    """A table, what could not be compared, and whether that was on another machine."""
    bad: Sequence[str]
    """Metrics that are worse, or that do not agree; and benchmarks that failed in one run only."""
    compared: int


def compare(goals: Sequence[Goal], committed: Kept, new: Kept) -> Comparison:
    """Whether a ratio of the new run is worse than the committed one's by more than noise (`suite.noise.noise_of`).

    Only ratios of goals.yaml that say which way is up, since another machine has other seconds; and only where both
    runs had the same config, which a quick run of some benchmarks has not. A benchmark that failed now is bad, too.
    """
    up = [goal for goal in goals if goal.up]
    found = list(differences(up, committed.results(), new.results(), only_ratios=True))
    worse = [d.worse for d in found]
    text = _told(found, worse, "WORSE", committed, new)
    if gone := not_any_more(up, committed.results(), new.results(), only_ratios=True):
        text += f"\nnot measured now: {', '.join(gone)}"
    return _comparison(found, worse, text, list(_lost(committed, new)))


def agree(goals: Sequence[Goal], first: Kept, second: Kept) -> Comparison:
    """Whether two runs on one machine differ by no more than the noise, in every metric that has one."""
    found = list(differences(goals, first.results(), second.results(), only_ratios=False))
    apart = [not d.agrees for d in found]
    lost = [*_lost(first, second), *_lost(second, first)]
    return _comparison(found, apart, _told(found, apart, "APART", first, second), lost)


def _comparison(
    found: Sequence[Difference], bad: Sequence[bool], text: str, lost: Sequence[tuple[str, str]]
) -> Comparison:
    wrong = [d.goal.metric for d, is_bad in zip(found, bad, strict=True) if is_bad]
    lines = [text, *(f"{name}: {why}" for name, why in lost)]
    return Comparison("\n".join(lines), [*wrong, *(name for name, _ in lost)], len(found))


def _lost(before: Kept, now: Kept) -> Iterator[tuple[str, str]]:
    """Benchmarks that gave figures before, and have failed now, each with why."""
    outcomes = now.outcomes()
    for name in before.results():
        if (outcome := outcomes.get(name)) is not None and not outcome.good:
            yield name, f"{outcome.status}: {outcome.why}"


def _told(found: Sequence[Difference], bad: Sequence[bool], word: str, before: Kept, now: Kept) -> str:
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
    text = (
        as_text([HEADER, *lines]) if lines else "nothing to compare: no metric of goals.yaml is in both, measured alike"
    )
    if others := other_configs(before.results(), now.results()):
        text += f"\nnot compared, since their configs differ: {', '.join(others)}"
    old, new = _machines(before.results()), _machines(now.results())
    if old and new and old != new:
        text += f"\nanother machine: {old} before, {new} now"
    return text


def _machines(results: Mapping[str, Result]) -> str:
    return " and ".join(
        sorted({f"{result.machine.cores} cores of {result.machine.cpu}" for result in results.values()})
    )
