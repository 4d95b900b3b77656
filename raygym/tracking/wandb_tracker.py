"""Weights & Biases."""

from __future__ import annotations

import importlib
import math
import os
import re
import secrets
from typing import Any

from raygym.histogram import Histogram
from raygym.logging_config import WandbConfig
from raygym.run_row import Row, scalars
from raygym.tracking.tracker import Outcome, TrackedRun

_FINISH_TIMEOUT_S = 45.0
_INIT_TIMEOUT_S = 90.0


class WandbTracker:
    """A run of W&B. Its x axis is raygym's step, since W&B's own cannot go back when steps are made again."""

    def __init__(self, config: WandbConfig, run: TrackedRun) -> None:
        """Begin a run, or go on with `run.id`.

        Raises:
            ImportError: wandb is not installed.
            PermissionError: there is no key.
            Exception: wandb's own, such as those of the network.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its errors are nobody's but the user's
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError("wandb is not installed; pip install 'raygym[wandb]'") from error
        mode = os.environ.get("WANDB_MODE", "online") if config.mode == "auto" else config.mode
        # Never let it ask on the terminal for what nobody sees.
        if mode == "online" and not wandb.login(prompt=False):
            raise PermissionError("no key; set WANDB_API_KEY, run `wandb login`, or use logging.wandb.mode=offline")
        self.id = run.id or f"{re.sub(r'[^A-Za-z0-9_-]+', '-', run.name)[:100]}-{secrets.token_hex(4)}"
        self._wandb = wandb
        self._run = wandb.init(
            project=config.project,
            entity=config.entity or None,
            group=config.group or None,
            tags=config.tags or None,
            mode=mode,
            id=self.id,
            name=run.name,
            resume="allow",
            dir=str(run.path),
            config=dict(run.config),
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                init_timeout=_INIT_TIMEOUT_S,
                finish_timeout=_FINISH_TIMEOUT_S,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, row: Row) -> None:
        """See `Tracker`."""
        numbers: dict[str, Any] = {name: value for name, value in scalars(row).items() if math.isfinite(value)}
        shapes = {name: self._histogram(value) for name, value in row.items() if isinstance(value, Histogram)}
        self._run.log({**numbers, **shapes, "step": step})

    def close(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if outcome is Outcome.FINISHED else 1)

    def _histogram(self, histogram: Histogram) -> Any:
        # Ours is open at both ends; theirs has an edge more than counts.
        ends = min(histogram.low, histogram.edges[0]), max(histogram.high, histogram.edges[-1])
        edges = [ends[0], *histogram.edges, ends[1]]
        return self._wandb.Histogram(np_histogram=(list(histogram.counts), edges))
