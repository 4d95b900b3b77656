"""What a report says, before it is HTML or Markdown."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import raygym
from raygym.live_console import duration
from raygym.report import played
from raygym.report.columns import Columns
from raygym.report.curves import Chart, charts
from raygym.report.drawing import number
from raygym.report.environments import Environment, environments
from raygym.report.episodes import Extremes, extremes
from raygym.report.odd_values import ODD, finite, or_noted
from raygym.run_reading import UnreadableRun, check_own, json_file, json_lines

_MOST_TOLD = 20
_PARTS = ("generate", "learn", "sync", "validate_wait", "checkpoint")
"""Of a step's time; what is left of it is `other`."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that a page shows."""

    name: str
    state: str
    """How the run ended, or that it has not."""
    finished: bool
    headline: tuple[tuple[str, str], ...]
    """The few numbers that matter: label and value."""
    facts: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]
    time_split: tuple[tuple[str, float, float], ...]
    """Part of a step, its mean seconds, its share from 0 to 1."""
    environments: tuple[Environment, ...]
    failures: tuple[tuple[str, int], ...]
    alarms: tuple[tuple[int, str, str], ...]
    """Step, name, reason."""
    events: tuple[str, ...]
    """What was lost and what came back."""
    episodes: Extremes
    config: str
    notes: tuple[str, ...]
    """What of the run's files could not be read."""
    made: str


def read_contents(run: Path) -> Contents:
    """Read a run's folder, whether it has ended, still goes on or was killed.

    Raises:
        UnreadableRun: it is no run's folder.
    """
    problems: Counter[str] = Counter()

    def damaged(problem: str) -> None:
        if problem in problems or len(problems) < _MOST_TOLD:
            problems[problem] += 1

    text, config = _config(run, damaged)
    columns = Columns(json_lines(run / "metrics.jsonl", damaged, within=run))
    try:
        summary = {**json_file(run / "request.json", within=run), **json_file(run / "summary.json", within=run)}
    except UnreadableRun as error:
        summary = {}
        damaged(str(error))
    events = list(json_lines(run / "events.jsonl", damaged, within=run))
    labels = [str(env.get("name") or env.get("id")) for env in _sections(config, "envs")]
    rollout = played.is_rollout(summary)
    source = run / ("summary.json" if rollout else "metrics.jsonl")

    def state() -> str:
        return played.state(summary) if rollout else _state(run, columns, summary, events)

    def headline() -> tuple[tuple[str, str], ...]:
        return played.headline(summary) if rollout else _headline(columns, config)

    def of_environments() -> tuple[Environment, ...]:
        return tuple(played.environments(summary) if rollout else environments(columns, labels))

    return Contents(
        name=str(config.get("name") or run.name),
        state=or_noted(damaged, run / "summary.json", "how it ended", state, "how it ended is not known"),
        finished="seconds" in summary and not summary.get("missing_tasks"),
        headline=or_noted(damaged, source, "the headline", headline, ()),
        facts=or_noted(damaged, run / "summary.json", "the facts", lambda: _facts(run, columns, config, summary), ()),
        charts=or_noted(damaged, source, "the curves", lambda: tuple(charts(columns)), ()),
        time_split=or_noted(damaged, source, "where the time goes", lambda: _time_split(columns), ()),
        environments=or_noted(damaged, source, "the environments", of_environments, ()),
        failures=or_noted(damaged, source, "the failures", lambda: _failures(columns, summary, rollout=rollout), ()),
        alarms=_alarms(run, damaged=damaged),
        events=tuple(_event(event) for event in events[-_MOST_TOLD:]),
        episodes=or_noted(
            damaged, run, "the best and worst episodes", lambda: extremes(run, damaged), Extremes((), (), "")
        ),
        config=text,
        notes=tuple(f"{what} ({times} times)" if times > 1 else what for what, times in problems.items()),
        made=f"raygym {raygym.__version__}, {_clock(time.time())}",
    )


def _config(run: Path, damaged: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    path = run / "config.yaml"
    check_own(path, run)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        expected = "expected a run's folder, such as runs/demo, which `raygym train` makes"
        raise UnreadableRun(f"{path}: cannot be read ({error.strerror}); {expected}") from error
    try:
        # Not `load_config`: a report of a run that another version made is still a report.
        found = yaml.safe_load(text)
    except (yaml.YAMLError, *ODD):
        found = None
    if not isinstance(found, dict):
        damaged(f"{path}: is no mapping in YAML; what the config says is left out")
        return text, {}
    for key in ("policy", "rollout", "learner"):
        if not isinstance(found.get(key) or {}, dict):
            damaged(f"{path}: {key} is a {type(found.pop(key)).__name__}; expected a mapping")
    return text, found


def _state(run: Path, columns: Columns, summary: dict[str, Any], events: list[dict[str, Any]]) -> str:
    if summary:
        return f"finished in {duration(float(summary.get('seconds', 0)))}"
    given_up = [event for event in events if event.get("what") == "given_up"]
    if given_up:
        return f"stopped after step {columns.steps}: {_event(given_up[-1])}"
    written = max((path.stat().st_mtime for path in run.glob("*.jsonl")), default=None)
    if written is None:
        return "nothing was written yet"
    ago = duration(max(0.0, time.time() - written))
    return f"not finished: step {columns.steps} was written {ago} before this report, {_clock(written)}"


def _headline(columns: Columns, config: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    def from_to(name: str) -> str:
        points = columns[name]
        return f"{points[0][1]:.3f} → {points[-1][1]:.3f}" if points else "-"

    rate = columns.total("tokens/generated") / max(columns.total("time/step_s"), 1e-9)
    return (
        ("validation reward", from_to("val/reward")),
        ("training reward", from_to("reward/mean")),
        ("steps", f"{columns.steps} of {config.get('steps', '?')}"),
        ("tokens a second", number(rate) if columns["time/step_s"] else "-"),
    )


def _facts(run: Path, columns: Columns, config: dict[str, Any], summary: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    policy, rollout, learner = (config.get(key) or {} for key in ("policy", "rollout", "learner"))
    facts = [
        ("folder", str(run.resolve())),
        ("policy", f"{policy.get('model', '?')}, {policy.get('replicas', 1)} x {policy.get('engine', 'vllm')}"),
    ]
    if played.is_rollout(summary):
        return (*facts, ("temperature", number(summary.get("temperature"))))
    generated, trained = columns.total("tokens/generated"), columns.total("tokens/trained")
    facts += [
        ("method", f"{learner.get('algorithm', 'grpo')}, learning rate {learner.get('lr', '?')}"),
        ("batch", f"{rollout.get('groups_per_step', '?')} groups x {rollout.get('group_size', '?')} episodes a step"),
        ("episodes", f"{columns.total('episodes/completed'):,.0f}"),
        ("tokens", f"{generated:,.0f} generated, {trained:,.0f} trained"),
    ]
    saved = summary.get("checkpoint")
    facts += [("checkpoint", str(saved))] if saved else []
    facts += [("weights", f"checksum {summary['weights_checksum']}")] if "weights_checksum" in summary else []
    facts += [("restarts", ", ".join(f"{n} {k}" for k, n in summary["restarts"].items()))] if _restarts(summary) else []
    return tuple(facts)


def _restarts(summary: dict[str, Any]) -> bool:
    return isinstance(summary.get("restarts"), dict)


def _failures(columns: Columns, summary: dict[str, Any], *, rollout: bool) -> tuple[tuple[str, int], ...]:
    of_steps = {name.rpartition("/")[2]: int(columns.total(name)) for name in columns.names("episodes/failed/")}
    failures = dict(summary.get("failures", {})) if rollout else of_steps
    return tuple(sorted(failures.items(), key=lambda item: -item[1]))


def _time_split(columns: Columns) -> tuple[tuple[str, float, float], ...]:
    whole = columns.mean("time/step_s")
    if not whole:
        return ()
    steps = len(columns["time/step_s"])
    # Checkpoints are made after a step's end.
    parts = [(part, columns.total(f"time/{part}_s") / steps) for part in _PARTS]
    inside = sum(seconds for part, seconds in parts if part != "checkpoint")
    parts.append(("other", max(0.0, whole - inside)))
    total = sum(seconds for _, seconds in parts) or 1.0
    return tuple((part, seconds, seconds / total) for part, seconds in parts if seconds / total >= 0.001)


def _alarms(run: Path, *, damaged: Callable[[str], None]) -> tuple[tuple[int, str, str], ...]:
    found = []
    for path in sorted((run / "alarms").glob("*/alarm.json"))[-_MOST_TOLD:]:
        try:
            alarm = json_file(path, within=run)
        except UnreadableRun as error:
            damaged(str(error))
            continue
        if not isinstance(step := alarm.get("step", 0), int):
            damaged(f"{path}: step is {step!r}; expected a whole number")
            continue
        found.append((step, str(alarm.get("alarm")), str(alarm.get("reason"))))
    return tuple(found)


def _event(event: dict[str, Any]) -> str:
    parts = [str(event.get(key) or "") for key in ("name", "what", "cause")]
    told = f"{parts[0]} {parts[1].replace('_', ' ')}" + (f": {parts[2]}" if parts[2] else "")
    recovery = finite(event.get("recovery_s"))
    return told + (f" (after {recovery:.0f} s)" if recovery is not None else "")


def _sections(config: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = config.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
