"""MLflow."""

from __future__ import annotations

import importlib
import math
import os
import re
import time
from pathlib import Path
from typing import Any

from raygym.config_change import flat
from raygym.logging_config import MlflowConfig
from raygym.run_row import Row, scalars
from raygym.tracking.tracker import Outcome, TrackedRun

# What a call of `log_batch` may carry.
_MOST_PARAMS = 100
_MOST_METRICS = 1000
_LONGEST_PARAM = 6000
_UNSAFE = re.compile(r"[^/\w.\- :]")
_STATUS = {Outcome.FINISHED: "FINISHED", Outcome.FAILED: "FAILED", Outcome.INTERRUPTED: "KILLED"}


class MlflowTracker:
    """A run of MLflow. The config is its parameters; of a step that was made again, MLflow keeps both values."""

    def __init__(self, config: MlflowConfig, run: TrackedRun) -> None:
        """Begin a run, or go on with `run.id`.

        Raises:
            ImportError: mlflow is not installed.
            Exception: mlflow's own, such as those of the network.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # who asked for a tracker has asked for no more
        try:
            mlflow: Any = importlib.import_module("mlflow")
        except ImportError as error:
            raise ImportError("mlflow is not installed; pip install 'raygym[mlflow]'") from error
        self._entities = mlflow.entities
        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _database(run.path.parent)
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        if run.id:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(config.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(config.experiment)
        self.id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        values = flat(dict(run.config))
        params = [self._entities.Param(_safe(key), str(value)[:_LONGEST_PARAM]) for key, value in values.items()]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self.id, params=params[start : start + _MOST_PARAMS])

    def log(self, step: int, row: Row) -> None:
        """See `Tracker`."""
        now_ms = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(_safe(name), value, now_ms, step)
            for name, value in scalars(row).items()
            if math.isfinite(value)
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _MOST_METRICS])

    def close(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self.id, status=_STATUS[outcome])


def _database(runs: Path) -> str:
    return f"sqlite:///{(runs / 'mlflow.db').resolve()}"


def _safe(name: str) -> str:
    """The name as MLflow takes it; an environment's label may have other characters."""
    return _UNSAFE.sub("_", name)
