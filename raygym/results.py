"""What `raygym.train` and `raygym.rollout` return: the folder that is left, read when asked."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

from raygym.checkpoint import CheckpointStore
from raygym.config import ConfigError, RunConfig
from raygym.config_file import load_config
from raygym.report.command import write_report
from raygym.run_reading import UnreadableRun, json_file, json_lines, parsed_trajectory, trajectory_files
from raygym.types import Trajectory

_Kind = Literal["step", "validation"]


class _Folder:
    """What a run and a rollout have in common."""

    path: Path

    def report(self, out: str | Path | None = None) -> Path:
        """Write report.html and report.md as `raygym report` does, by default into its folder; returns the first."""
        return write_report(self.path, None if out is None else Path(out))[0]


class Run(_Folder):
    """A training run's folder, whether the run has ended, still goes on, or was killed."""

    def __init__(self, path: str | Path) -> None:
        """Nothing is read but its config.

        Args:
            path: the folder, `runs/<name>`.

        Raises:
            UnreadableRun: it is no run's folder.
            ConfigError: its config is not one of this version.
        """
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise UnreadableRun(f"{self.path}: is no run's folder; expected one that `raygym train` made (runs/<name>)")
        self.config: RunConfig = load_config(self.path / "config.yaml")

    @property
    def finished(self) -> bool:
        """All its steps were made."""
        return bool(self.summary)

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds, such as `validation_reward` and `seconds`; {} where the run has not ended well."""
        return json_file(self.path / "summary.json", within=self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, a mapping of names to numbers for each step; docs/guides/metrics.md names them.

        `pandas.DataFrame(run.metrics)` is a table of them.
        """
        return list(json_lines(self.path / "metrics.jsonl", within=self.path))

    @property
    def validation_reward(self) -> dict[int, float]:
        """By step, the mean reward on the held-out tasks."""
        found = {
            row["step"]: row.get("val/reward") for row in json_lines(self.path / "metrics.jsonl", within=self.path)
        }
        return {step: float(reward) for step, reward in found.items() if reward is not None}

    @property
    def checkpoint(self) -> Path | None:
        """The folder of its last checkpoint, which `transformers` and vLLM load; None where it has none."""
        store = CheckpointStore(self.path / "checkpoints", keep_last=1, keep_best=0)
        steps = store.steps()
        return store.path_of(steps[-1]) if steps else None

    def trajectories(self, kind: _Kind = "step") -> Iterator[Trajectory]:
        """Its episodes in order, read one at a time: those that were trained, or those of the validations.

        Raises:
            UnreadableRun: a file is damaged.
            ConfigError: there is no such kind.
        """
        if kind not in get_args(_Kind):
            raise ConfigError(f"kind: {kind!r} is none; expected one of: {', '.join(get_args(_Kind))}")
        return self._trajectories(kind)

    def _trajectories(self, kind: _Kind) -> Iterator[Trajectory]:
        for _, path in trajectory_files(self.path, kind):
            yield from map(parsed_trajectory, json_lines(path, within=self.path))

    def __repr__(self) -> str:
        """One line: where it is and how far."""
        steps = sum(1 for _ in json_lines(self.path / "metrics.jsonl", within=self.path))
        rewards = list(self.validation_reward.values())
        validated = f", validation reward {rewards[0]:.3f} -> {rewards[-1]:.3f}" if rewards else ""
        return f"Run({str(self.path)!r}: {steps} rows of metrics{validated}{', finished' * self.finished})"

    def _repr_html_(self) -> str:
        """In a notebook: the summary as a table."""
        return _table(str(self.path), self.summary or {"": "not finished"})


class Rollout(_Folder):
    """Played episodes. Iterating reads them from their file one at a time, so that a million of them fit."""

    def __init__(self, path: str | Path, *, temporary: bool = False) -> None:
        """Nothing is read yet.

        Args:
            path: the folder of the rollout.
            temporary: the folder is removed when this object is gone.

        Raises:
            UnreadableRun: there is no such folder.
        """
        self.path = Path(path)
        """Its folder. A temporary one lives as long as this object: who keeps only the path keeps a name of nothing."""
        if not self.path.is_dir():
            raise UnreadableRun(f"{self.path}: is no folder; expected one that `raygym rollout` made (rollouts/<name>)")
        if temporary:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds: `reward`, its standard error, `pass_at`, tokens per second, each environment."""
        return json_file(self.path / "summary.json", within=self.path)

    def __iter__(self) -> Iterator[Trajectory]:
        """The episodes, those of a task one after the other. Raises UnreadableRun where the file is damaged."""
        # A generator keeps `self`, and so a temporary folder, until it is read, also in `for t in rg.rollout(...)`.
        yield from map(parsed_trajectory, json_lines(self.path / "trajectories.jsonl", within=self.path))

    def __len__(self) -> int:
        """Episodes, those of tasks that were given up not counted."""
        return int(self.summary.get("episodes", 0))

    def __repr__(self) -> str:
        """One line: how many episodes, and the reward."""
        reward = self.summary.get("reward")
        mean = "no reward" if reward is None else f"reward {reward:.3f}"
        return f"Rollout({str(self.path)!r}: {len(self)} episodes, {mean})"

    def _repr_html_(self) -> str:
        """In a notebook: the summary as a table."""
        return _table(str(self.path), self.summary)


def _table(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table><caption style='text-align:left'>{escape(title)}</caption>{rows}</table>"
