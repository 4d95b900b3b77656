"""What a run leaves in its directory: config, metrics, trajectories, ledger, alarms, summary."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raygym.alarms import Alarm
from raygym.config import RunConfig
from raygym.config_file import dump_config
from raygym.histogram import Histogram
from raygym.schedule import Collected
from raygym.types import Trajectory
from raygym.whole_file import write_whole

Row = Mapping[str, float | str | Histogram]
"""What is known of one step, by the names that people see."""


class HeldRow:
    """A step's row of metrics.jsonl that waits for the rest of it. It is written once, whichever thread is first."""

    def __init__(self, write: Callable[[Row], None], row: Row) -> None:
        self._write = write
        self._row = row
        self._lock = threading.Lock()
        self._written = False

    def write(self, rest: Row | None = None) -> None:
        """Write it with the rest; without, as it is, where the rest will not come. Later calls do nothing."""
        with self._lock:
            if not self._written:
                self._written = True
                self._write({**self._row, **(rest or {})})


class RunFiles:
    """The writer of one run's directory. Every line is flushed: a killed run loses nothing that was reported."""

    def __init__(self, config: RunConfig) -> None:
        """Create the directory. An earlier run of the same name is moved aside, never overwritten."""
        self.path = config.run_dir
        self.moved_to = move_aside(self.path)
        (self.path / "trajectories").mkdir(parents=True)
        (self.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        self._keep_trajectories = config.logging.trajectories
        self._tensorboard = _tensorboard(self.path) if config.logging.tensorboard else None
        self._held: HeldRow | None = None

    def metrics(self, step: int, row: Row) -> None:
        """Append what is known of one step to metrics.jsonl and TensorBoard."""
        self._append("metrics.jsonl", {"step": step, **{name: _as_json(value) for name, value in row.items()}})
        if self._tensorboard is not None:
            for name, value in row.items():
                if isinstance(value, Histogram):
                    _add_histogram(self._tensorboard, name, value, step)
                elif not isinstance(value, str):
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def hold(self, step: int, row: Row) -> HeldRow:
        """Keep a step's row back until the rest of it is known, or the files are closed. Rows keep their order: the
        one that was held before must have been written."""
        self._held = HeldRow(lambda whole: self.metrics(step, whole), row)
        return self._held

    def rollouts(self, step: int, collected: Collected, kind: str = "step") -> None:
        """Write the trajectories of one step or validation."""
        if self._keep_trajectories:
            trajectories = [t for group in collected.groups for t in group.trajectories]
            name = f"trajectories/{kind}_{step:06d}.jsonl"
            self._append(name, *(trajectory_record(t) for t in trajectories))

    def ledger(self, step: int, collected: Collected) -> None:
        """Account for every task of a step that was trained: trained once, or dropped with its cause.

        Beside it, `scheduler.json` says where the scheduler stood after this step.
        """
        trained = [
            {"step": step, "task": group.task.index, "env": group.task.env, "group_id": group.group_id, "trained": True}
            for group in collected.groups
        ]
        dropped = [
            {
                "step": step,
                "task": drop.task.index,
                "env": drop.task.env,
                "group_id": drop.group_id,
                "trained": False,
                "cause": drop.cause,
            }
            for drop in collected.dropped
            if drop.task.split == "train"
        ]
        self._append("ledger.jsonl", *trained, *dropped)
        # Whole or not at all: whoever goes on from it must not find half of it.
        write_whole(self.path / "scheduler.json", json.dumps(collected.state.to_json()) + "\n")

    def alarm(self, step: int, alarm: Alarm, metrics: Mapping[str, float], collected: Collected) -> Path:
        """Keep a step at which something went wrong, whatever `logging.trajectories` says; returns the folder."""
        folder = self.path / "alarms" / f"step_{step:06d}_{alarm.name}"
        folder.mkdir(parents=True, exist_ok=True)
        records = [trajectory_record(t) for group in collected.groups for t in group.trajectories]
        # The same step may be made again after a run was resumed: what was there is replaced.
        write_whole(folder / "trajectories.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        found = {
            "step": step,
            "alarm": alarm.name,
            "action": alarm.action,
            "reason": alarm.reason,
            "metrics": {name: _as_json(value) for name, value in metrics.items()},
        }
        write_whole(folder / "alarm.json", json.dumps(found, indent=2) + "\n")
        return folder

    def summary(self, result: Mapping[str, Any]) -> None:
        """Write summary.json, the run's end."""
        (self.path / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Write the row that is still held, as it is; flush and close TensorBoard's file."""
        if self._held is not None:
            self._held.write()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, name: str, *records: Mapping[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def trajectory_record(trajectory: Trajectory) -> dict[str, Any]:
    """One trajectory as JSON: everything needed to read it and to recompute its loss."""
    return {
        "env": trajectory.task.env,
        "task": trajectory.task.index,
        "seed": trajectory.task.seed,
        "split": trajectory.task.split,
        "group_id": trajectory.group_id,
        "episode": trajectory.episode,
        "attempt": trajectory.attempt,
        "status": trajectory.status,
        "failure": trajectory.failure,
        "reward": trajectory.reward,
        "drifted": trajectory.drifted,
        "messages": list(trajectory.messages),
        "turns": [
            {
                "start": turn.start,
                "end": turn.end,
                "reward": turn.reward,
                "finish_reason": turn.finish_reason,
                "generate_s": round(turn.generate_s, 4),
                "env_s": round(turn.env_s, 4),
            }
            for turn in trajectory.turns
        ],
        "sampling": {"temperature": trajectory.sampling.temperature, "max_tokens": trajectory.sampling.max_tokens},
        "metrics": trajectory.metrics,
        "reward_components": trajectory.reward_components,
        "token_ids": trajectory.token_ids.tolist(),
        "loss_mask": trajectory.loss_mask.astype(int).tolist(),
        "logprobs": [round(value, 6) for value in trajectory.logprobs.tolist()],
        "weight_versions": trajectory.weight_versions.tolist(),
    }


def move_aside(path: Path) -> Path | None:
    """Rename `path`, if there is one, to a free name with its time; returns that name."""
    if not path.exists():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    target = path.with_name(f"{path.name}.{stamp}")
    suffix = 1
    while target.exists():
        suffix += 1
        target = path.with_name(f"{path.name}.{stamp}-{suffix}")
    path.rename(target)
    return target


def _as_json(value: float | str | Histogram) -> Any:
    if isinstance(value, Histogram):
        return value.to_json()
    # JSON has no NaN and no infinity; most readers refuse what Python would write for them.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _add_histogram(tensorboard: Any, name: str, histogram: Histogram, step: int) -> None:
    tensorboard.add_histogram_raw(
        name,
        min=histogram.low,
        max=histogram.high,
        num=sum(histogram.counts),
        sum=histogram.total,
        sum_squares=histogram.squares,
        bucket_limits=[*histogram.edges, sys.float_info.max],
        bucket_counts=list(histogram.counts),
        global_step=step,
    )


def _tensorboard(path: Path) -> Any:
    # TensorBoard's writer takes a second to import and is optional.
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(path / "tensorboard"))
