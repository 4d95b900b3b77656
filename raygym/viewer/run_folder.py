"""The folder that is viewed: everything that the page asks for, kept up to date by one thread. Nothing is written."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from raygym.models import ModelError, cache_dir, find_policy, is_hub_id
from raygym.run_reading import is_own
from raygym.viewer.growing_lines import GrowingLines
from raygym.viewer.metric_series import MetricSeries
from raygym.viewer.token_text import TokenText
from raygym.viewer.trajectory_index import TrajectoryIndex
from raygym.viewer.trajectory_row import TrajectoryRow
from raygym.viewer.trajectory_view import Record, parse_record

_LOOK_EVERY_S = 0.5
_QUIET_S, _QUIET_STEPS = 120.0, 3.0
"""A run that has written nothing for so long, and for so many times its last step's time, is called quiet."""
_SUMMARY_LAG_S = 1.0
_MOST_EVENTS = 1000
_MOST_TEXT = 2**20
_KEPT_RECORDS = 32
_NAMED = re.compile(r"[\w-]+")


class NotARun(ValueError):
    """There is nothing to view. The text says what was expected."""


class RunFolder:
    """One run, one rollout, or one file of trajectories. Used from any thread."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet.

        Raises:
            NotARun: `path` is none of these.
        """
        self.path = path
        self.kind = _kind(path)
        self.trajectories = TrajectoryIndex(path)
        self.metrics = MetricSeries(path / "metrics.jsonl")
        self._event_lines = GrowingLines(path / "events.jsonl", path)
        self._events: list[dict[str, Any]] = []
        self._events_revision = 0
        self._unreadable_events = 0
        self._failed: dict[str, str] = {}
        """By what was looked at: what the last look has failed with."""
        self._records: OrderedDict[tuple[str, int, int, int], Record] = OrderedDict()
        self._records_lock = threading.Lock()
        self._token_text: TokenText | None = None
        self._looked_for_tokens = -1e9
        self._tokens_lock = threading.Lock()
        self._stopped = threading.Event()
        # The metrics have a thread of their own: the first view must not wait for a long file of trajectories.
        self._threads = [
            threading.Thread(target=self._follow, args=(look,), daemon=True)
            for look in (self._look_at_metrics, self._look_at_trajectories)
        ]

    def start(self) -> None:
        """Begin to read and to follow."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End it."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def refresh(self) -> None:
        """Read everything that is there now."""
        self._look_at_metrics()
        self._look_at_trajectories()

    def status(self) -> dict[str, Any]:
        """What changes while a run goes on, in few bytes."""
        progress = self.trajectories.progress
        state, told = self._state()
        problems = [*self._failed.values(), self.metrics.problem, self._event_lines.problem, self.trajectories.problem]
        return {
            "state": state,
            "told": told,
            "step": self.metrics.last_step,
            "metrics_revision": self.metrics.revision,
            "trajectories_revision": self.trajectories.revision,
            "events_revision": self._events_revision,
            "read_bytes": progress.read_bytes,
            "total_bytes": progress.total_bytes,
            "files": progress.files,
            "unreadable": progress.unreadable + self.metrics.unreadable + self._unreadable_events,
            "problem": next(filter(None, problems), ""),
        }

    def overview(self) -> dict[str, Any]:
        """What the run is, and how it ended if it has."""
        config_text = self._text("config.yaml")
        config = _mapping(config_text)
        name, steps = config.get("name"), config.get("steps")
        return {
            "name": name if isinstance(name, str) and name else self.path.name,
            "folder": self.path.name,
            "kind": self.kind,
            "steps": steps if self.kind == "run" and isinstance(steps, int) else None,
            "model": self._model(),
            "config": config_text,
            "summary": _json_object(self._text("summary.json")),
            "request": _json_object(self._text("request.json")),
            "metrics": self.metrics.names,
            "alarms": self._alarms(),
            "status": self.status(),
        }

    def events(self) -> list[dict[str, Any]]:
        """Losses and recoveries of the run's parts, the newest last."""
        return self._events[-_MOST_EVENTS:]

    def record(self, row: TrajectoryRow) -> Record:
        """One trajectory whole; the last few are kept.

        Raises:
            OSError, LookupError, ValueError: it is not there any more.
        """
        key = (row.file, row.generation, row.offset, row.length)
        with self._records_lock:
            if key in self._records:
                self._records.move_to_end(key)
                return self._records[key]
        record = parse_record(self.trajectories.line(row))
        with self._records_lock:
            self._records[key] = record
            while len(self._records) > _KEPT_RECORDS:
                self._records.popitem(last=False)
        return record

    def token_text(self) -> TokenText | None:
        """The tokenizer of the run's policy, if its files are on this machine."""
        with self._tokens_lock:
            # A run that has only begun may have a checkpoint later.
            if self._token_text is None and time.monotonic() - self._looked_for_tokens > 10:
                self._looked_for_tokens = time.monotonic()
                self._token_text = self._find_token_text()
            return self._token_text

    def _find_token_text(self) -> TokenText | None:
        for folder in sorted((self.path / "checkpoints").glob("step_*"), reverse=True):
            if is_own(folder / "tokenizer.json", self.path) and (found := TokenText.of(folder)) is not None:
                return found
        model = self._model()
        if model is None:
            return None
        if Path(model).expanduser().is_dir():
            return TokenText.of(Path(model).expanduser())
        if _NAMED.fullmatch(model):  # of raygym's own; what is not built yet is not built for this
            built = sorted((cache_dir() / "models").glob(f"{model}-v*/"))
            return TokenText.of(built[-1]) if built else None
        try:
            found_policy = find_policy(model) if is_hub_id(model) else None
        except ModelError:
            return None
        return TokenText.of(found_policy) if found_policy is not None else None

    def _model(self) -> str | None:
        policy = _mapping(self._text("config.yaml")).get("policy")
        model = policy.get("model") if isinstance(policy, dict) else None
        return model if isinstance(model, str) else None

    def _follow(self, look: Callable[[], None]) -> None:
        while True:
            try:
                look()
                self._failed.pop(look.__name__, None)
            # Whatever it is, what comes later may be read again, and the page tells of it.
            except Exception as error:
                self._failed[look.__name__] = f"{type(error).__name__}: {error}"
            if self._stopped.wait(_LOOK_EVERY_S):
                return

    def _look_at_metrics(self) -> None:
        self.metrics.refresh()
        if self._event_lines.restarted():
            self._events, self._unreadable_events = [], 0
            self._events_revision += 1
        for _, line in self._event_lines.new():
            if event := _json_object(line):
                self._events.append(event)
                self._events_revision += 1
            else:
                self._unreadable_events += 1

    def _look_at_trajectories(self) -> None:
        self.trajectories.refresh(self._stopped.is_set)

    def _state(self) -> tuple[str, str]:
        """`running`, `quiet`, `stopped` or `finished`, and that in words; `file` and none where there is no run."""
        if self.kind == "file":
            return "file", ""
        changed = self._last_change()
        summary = self.path / "summary.json"
        if is_own(summary, self.path):
            missing = (_json_object(self._text("summary.json")) or {}).get("missing_tasks")
            if not (isinstance(missing, int) and missing > 0):
                return "finished", "finished"
            # An interrupted rollout has a summary as well, which lies there while the same command goes on.
            if changed <= summary.stat().st_mtime + _SUMMARY_LAG_S:
                return "stopped", f"stopped, {missing} {'task' if missing == 1 else 'tasks'} missing"
        quiet_s = time.time() - changed
        if quiet_s < max(_QUIET_S, _QUIET_STEPS * (self.metrics.last("time/step_s") or 0.0)):
            return "running", "running"
        if any(event.get("what") == "given_up" for event in self._events[-1:]):
            return "stopped", "stopped"
        return "quiet", f"quiet for {_long(quiet_s)}"

    def _last_change(self) -> float:
        """When anything of the run was written last. A folder changes with each file that is made in it."""
        return max((at for path in self._written() if (at := _changed(path)) is not None), default=0.0)

    def _written(self) -> Iterator[Path]:
        names = ("metrics.jsonl", "trajectories.jsonl", "config.yaml", "scheduler.json", "events.jsonl", "tally.json")
        yield from (self.path / name for name in (*names, "dropped.jsonl", "trajectories", "alarms", "logs"))
        yield from (self.path / "logs").glob("*")

    def _alarms(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted((self.path / "alarms").glob("*/alarm.json")):
            alarm = _json_object(self._text(path.relative_to(self.path).as_posix()))
            if alarm:
                found.append({name: alarm.get(name) for name in ("step", "alarm", "action", "reason")})
        return found

    def _text(self, name: str) -> str:
        """The beginning of one of the run's own small files; empty where there is none. `name` is never a request's."""
        try:
            if not is_own(self.path / name, self.path):
                return ""
            with (self.path / name).open("rb") as file:
                return file.read(_MOST_TEXT).decode(errors="replace")
        except OSError:
            return ""


def _kind(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".jsonl":
            return "file"
        raise NotARun(f"{path} is a file, but none of trajectories (.jsonl); give the run's folder, such as runs/demo")
    if not path.is_dir():
        raise NotARun(f"{path} is not there; give a run's folder, such as runs/demo, or a rollout's")
    if (path / "request.json").exists() or (path / "trajectories.jsonl").exists():
        return "rollout"
    if any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "trajectories")):
        return "run"
    inside = sorted(entry.name for entry in path.iterdir() if (entry / "config.yaml").exists())
    if inside:
        raise NotARun(f"{path} holds several runs ({', '.join(inside[:8])}); give one, such as {path / inside[0]}")
    raise NotARun(f"{path} is no folder of a run or rollout: it has no config.yaml, metrics.jsonl or trajectories")


def _mapping(text: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    # Dates that there are none of are values to YAML.
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _json_object(text: str | bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _changed(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def _long(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h" if minutes < 2880 else f"{minutes // 1440} days"
