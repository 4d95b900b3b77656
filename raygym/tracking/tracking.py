"""All trackers of one run, and what of it each of them has."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from raygym.config import RunConfig
from raygym.run_row import Row
from raygym.tracking.background import BackgroundTracker
from raygym.tracking.mlflow_tracker import MlflowTracker
from raygym.tracking.tracker import Outcome, TrackedRun, Tracker
from raygym.tracking.wandb_tracker import WandbTracker
from raygym.whole_file import write_whole

_CLOSE_TIMEOUT_S = 60.0
_FILE = "tracking.json"


class Tracking:
    """The trackers that `logging` names. Nothing here raises, or keeps the run waiting before its end."""

    def __init__(
        self,
        config: RunConfig,
        told: Callable[[str], None],
        beside: Iterable[Callable[[int, Row], None]] = (),
        close_timeout_s: float = _CLOSE_TIMEOUT_S,
    ) -> None:
        """Begin to connect. The run's folder is there, and is the one that it goes on in.

        Args:
            config: the run's.
            told: gets lines for a person, from any thread.
            beside: get every row of this process as well, in its own thread; who raises gets no more.
            close_timeout_s: how long `close` waits for all of them together.
        """
        self._told = told
        self._beside = list(beside)
        self._close_timeout_s = close_timeout_s
        self._known = _KnownRuns(config.run_dir / _FILE)
        plain = config.model_dump(mode="json")
        self._trackers: dict[str, BackgroundTracker] = {}

        def start(name: str, title: str, make: Callable[[TrackedRun], Tracker]) -> None:
            run = TrackedRun(config.name, config.run_dir, plain, self._known.id_of(name))
            logged = partial(self._known.note, name)
            self._trackers[name] = BackgroundTracker(title, partial(make, run), told, logged)

        if config.logging.wandb is not None:
            start("wandb", "W&B", partial(WandbTracker, config.logging.wandb))
        if config.logging.mlflow is not None:
            start("mlflow", "MLflow", partial(MlflowTracker, config.logging.mlflow))
        self._had = {name: self._known.step_of(name) for name in self._trackers}

    def catch_up(self, rows: Iterable[tuple[int, Row]]) -> None:
        """Give the trackers what they do not have of the steps before this process, which was killed before it sent
        them, or could not."""
        for step, row in rows:
            for name, tracker in self._trackers.items():
                if step > self._had[name]:
                    tracker.log(step, row)

    def log(self, step: int, row: Row) -> None:
        """One step's row, as it is in metrics.jsonl."""
        for tracker in self._trackers.values():
            tracker.log(step, row)
        for log in list(self._beside):
            try:
                log(step, row)
            except Exception as error:
                self._beside.remove(log)
                self._told(f"warning: Ray's metrics cannot be set ({type(error).__name__}: {error}); the run goes on")

    def close(self, outcome: Outcome) -> None:
        """The run has ended."""
        threads = [
            threading.Thread(target=tracker.close, args=(outcome, self._close_timeout_s), daemon=True)
            for tracker in self._trackers.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class _KnownRuns:
    """tracking.json: what each tracker calls the run, and the step up to which it has all that it takes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._runs: dict[str, dict[str, Any]] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self._runs = {name: {"id": str(run["id"]), "step": int(run["step"])} for name, run in found.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # there is none, or it is no such file: trackers begin a run of their own

    def id_of(self, name: str) -> str:
        return str(self._runs.get(name, {}).get("id", ""))

    def step_of(self, name: str) -> int:
        return int(self._runs.get(name, {}).get("step", -1))

    def note(self, name: str, run_id: str, step: int) -> None:
        with self._lock:
            self._runs[name] = {"id": run_id, "step": step}
            with suppress(OSError):  # a full disk: a resume sends some steps again
                write_whole(self._path, json.dumps(self._runs, indent=2) + "\n")
