"""What a folder of `raygym rollout` says, which has a summary and no steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygym.live_console import duration
from raygym.report.drawing import number
from raygym.report.environments import Environment
from raygym.report.odd_values import finite


def is_rollout(summary: Mapping[str, Any]) -> bool:
    """Whether it is one of a rollout: its summary.json with its request.json, which is there from the beginning."""
    return "samples" in summary


def headline(summary: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Reward, pass@k for the smallest and the largest k, and how much was played."""
    reward, error = summary.get("reward"), summary.get("reward_stderr")
    told = number(reward) + (f" ± {number(error)}" if error is not None else "")
    passed = list(summary.get("pass_at", {}).items())
    return (
        ("reward", told),
        *((f"pass@{k}", number(share)) for k, share in dict((passed[0], passed[-1]) if passed else ()).items()),
        ("episodes", f"{summary.get('episodes', 0):,}"),
        ("tokens a second", number(summary.get("tokens_per_s"))),
    )


def state(summary: Mapping[str, Any]) -> str:
    """How far it came."""
    tasks = f"{summary['tasks']} tasks of {summary['split']} x {summary['samples']}"
    if "seconds" not in summary:
        return f"not finished: {tasks}"
    played = f"{tasks}, played in {duration(float(summary['seconds']))}"
    if missing := summary.get("missing_tasks", 0):
        return f"not finished: {played}; {missing} {'task is' if missing == 1 else 'tasks are'} missing"
    return played


def environments(summary: Mapping[str, Any]) -> list[Environment]:
    """A row for each."""
    return [
        Environment(
            name=name,
            episodes=int(row["episodes"]),
            reward_first=None,
            reward_last=finite(row.get("reward")),
            turns=finite(row.get("turns_mean")),
            tokens=finite(row["tokens"] / row["episodes"]) if row["episodes"] else None,
            step_s=None,
            failed=sum(row["failures"].values()),
            own=tuple((f"pass@{k}", None, finite(share)) for k, share in row["pass_at"].items()),
        )
        for name, row in sorted(summary.get("envs", {}).items())
    ]
