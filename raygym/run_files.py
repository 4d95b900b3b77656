"""What a run leaves in its directory: config, metrics, trajectories, ledger, alarms, events, summary."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from raygym.alarms import Alarm
from raygym.checkpoint import CheckpointStore
from raygym.config import RunConfig
from raygym.config_file import dump_config
from raygym.durable import sync_file
from raygym.event_log import EventLog
from raygym.full_disk import DiskPatience, append_whole
from raygym.resume import ResumePoint, checkpoint_store
from raygym.run_cut import cut_lines, discard_folder, move_into
from raygym.run_row import Row, json_row, parsed_row, scalars
from raygym.schedule import Collected
from raygym.supervision import PartEvent
from raygym.types import BoolArray, Float32Array, Trajectory
from raygym.whole_file import write_whole

if TYPE_CHECKING:
    from raygym.tracking.tensorboard_events import TensorBoardEvents

LearnedLogprobs = tuple[Float32Array | None, BoolArray]
"""Of one trajectory, T logprobs that the learner computed (None: it computed none), and which tokens it trained."""


class HeldRow:
    """A step's row of metrics.jsonl that waits for the rest of it. It is written once, whichever thread is first."""

    def __init__(self, write: Callable[[Row, bool], None], row: Row) -> None:
        self._write = write
        self._row = row
        self._lock = threading.Lock()
        self._written = False

    def write(self, rest: Row | None = None, *, waits: bool = True) -> None:
        """Write it with the rest; without, as it is, where the rest will not come. Later calls do nothing.

        Args:
            rest: what was still missing.
            waits: for room on a full disk; otherwise the row is lost then.
        """
        with self._lock:
            if not self._written:
                self._written = True
                self._write({**self._row, **(rest or {})}, waits)


class RunFiles:
    """The writer of one run's directory. Every line is flushed: a killed run loses nothing that was reported."""

    def __init__(
        self,
        config: RunConfig,
        resumed: ResumePoint | None = None,
        told: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Create the directory, or go on in it.

        Args:
            config: the run's.
            resumed: where the run goes on; what it had done after that is cut off and kept in `discarded/`. Without it,
                an earlier run of the same name is moved aside, never overwritten.
            told: gets lines for a person, from any thread: what waits for room on a full disk.
        """
        self.path = config.run_dir
        self._config = config
        self.moved_to: Path | None = None
        """Where the earlier run is now."""
        self.discarded: Path | None = None
        """Where that is which was cut off."""
        self.scores: dict[int, float] = {}
        """By step, `checkpoint.best_metric` of each row that has it."""
        self.disk = DiskPatience(config.logging.disk_wait_s, told)
        """By which everything is written, once the run has begun."""
        self._events = EventLog(self.path / "events.jsonl", told)
        self._told = told
        self._best_metric = config.checkpoint.best_metric
        self._keep_trajectories = config.logging.trajectories
        self._rows: dict[int, Row] = {}
        self._held: HeldRow | None = None
        self._tensorboard: TensorBoardEvents | None = None
        self._follower: Callable[[int, Row], None] | None = None
        if resumed is None:
            self.moved_to = move_aside(self.path)
        self._open(resumed)

    def rewind(self, to: ResumePoint) -> None:
        """Go on from there in the same process, as another one would that is started after this one was killed."""
        self.close()
        self.scores, self._rows, self._held = {}, {}, None
        self._open(to)

    def _open(self, resumed: ResumePoint | None) -> None:
        if resumed is not None:
            # One folder for all tries: each goes on with what the one before has left to do.
            cut = partial(self._cut, resumed, checkpoint_store(self._config), discard_folder(self.path, resumed.step))
            self.disk.write(f"what {self.path} is cut back to", cut)
        trajectories = self.path / "trajectories"
        self.disk.write(str(trajectories), lambda: trajectories.mkdir(parents=True, exist_ok=True))
        self._write_whole(self.path / "config.yaml", dump_config(self._config))
        self._tensorboard = None
        if self._config.logging.tensorboard:
            try:
                self._tensorboard = _tensorboard(self.path)
            except OSError as error:
                self._told(f"TensorBoard's files cannot be written ({error}); metrics.jsonl has all rows")
        for step, row in self._rows.items():
            self._show(step, row)

    @property
    def rows(self) -> list[tuple[int, Row]]:
        """Step and row of what was there when the run was resumed, in order; none after `forget_rows`."""
        return sorted(self._rows.items(), key=lambda item: item[0])

    def follow(self, follower: Callable[[int, Row], None]) -> None:
        """Give each row that is written from now on to `follower`, too, which must neither wait nor raise."""
        self._follower = follower

    @property
    def scalars(self) -> list[dict[str, float]]:
        """The numbers of the rows of the steps before the resume, in order."""
        return [scalars(row) for _, row in self.rows]

    @property
    def validation_rewards(self) -> dict[int, float]:
        """By step, of the rows that were there when the run was resumed."""
        found = {step: row.get("val/reward") for step, row in self._rows.items()}
        return {step: float(reward) for step, reward in found.items() if isinstance(reward, int | float)}

    def has_row(self, step: int) -> bool:
        """Whether this step's row was there when the run was resumed, with its validation if it was to have one."""
        return step in self._rows

    def forget_rows(self) -> None:
        """Nobody asks any more for what was there: of a long run it would fill the driver's memory."""
        self._rows = {}

    def metrics(self, step: int, row: Row, *, waits: bool = True) -> None:
        """Append what is known of one step to metrics.jsonl and TensorBoard. `waits`: see `HeldRow.write`."""
        self._append("metrics.jsonl", {"step": step, **json_row(row)}, waits=waits)
        self._show(step, row)
        if self._follower is not None:
            self._follower(step, row)

    def _show(self, step: int, row: Row) -> None:
        if isinstance(score := row.get(self._best_metric), int | float):
            self.scores[step] = float(score)
        if self._tensorboard is not None:
            try:
                self._tensorboard.show(step, row)
            except OSError as error:
                self._tensorboard = None
                self._told(f"TensorBoard's files cannot be written ({error}) and end here; metrics.jsonl has all rows")

    def sync(self) -> None:
        """What was written of the steps is on the disk: a checkpoint may be made that takes it for granted."""
        for name in ("metrics.jsonl", "ledger.jsonl"):
            if (self.path / name).exists():
                sync_file(self.path / name)

    def _cut(self, resumed: ResumePoint, checkpoints: CheckpointStore, discarded: Path) -> None:
        """Leave what the checkpoint knows of. Whatever ends in here can be done again, from the beginning."""
        step = resumed.step

        def known(row: dict[str, Any]) -> bool:
            return bool(row["step"] <= step)

        def whole(row: dict[str, Any]) -> bool:
            # A run that was stopped while it validated has written the row without the validation.
            return known(row) and (row["step"] < step or not resumed.validated or "val/failed" in row)

        kept = cut_lines(self.path / "metrics.jsonl", whole, discarded)
        self._rows = {row.pop("step"): parsed_row(row) for row in kept}
        cut_lines(self.path / "ledger.jsonl", known, discarded)
        for path in sorted((self.path / "trajectories").glob("*.jsonl")):
            kind, _, number = path.stem.rpartition("_")
            of_step = int(number) if number.isdigit() else -1
            again = kind == "validation" and of_step == step and step not in self._rows
            if of_step > step or again:
                move_into(path, discarded / "trajectories")
        for path in sorted((self.path / "alarms").glob("step_*")):
            number = path.name.split("_")[1]
            if number.isdigit() and int(number) > step:
                move_into(path, discarded / "alarms")
        if resumed.checkpoint is not None:
            checkpoints.move_newer(step, discarded / "checkpoints")
        # It shows metrics.jsonl, and is written anew from it.
        move_into(self.path / "tensorboard", discarded)
        move_into(self.path / "summary.json", discarded)
        write_whole(self.path / "scheduler.json", json.dumps(resumed.rollouts.scheduler.to_json()) + "\n")
        self.discarded = discarded if discarded.exists() else None

    def hold(self, step: int, row: Row) -> HeldRow:
        """Keep a step's row back until the rest of it is known, or the files are closed. Rows keep their order: the
        one that was held before must have been written."""
        self._held = HeldRow(lambda whole, waits: self.metrics(step, whole, waits=waits), row)
        return self._held

    def rollouts(
        self, step: int, collected: Collected, kind: str = "step", learned: Sequence[LearnedLogprobs] | None = None
    ) -> None:
        """Write the trajectories of one step or validation. `learned`: of each, in order, what the learner computed."""
        if self._keep_trajectories:
            trajectories = [t for group in collected.groups for t in group.trajectories]
            name = f"trajectories/{kind}_{step:06d}.jsonl"
            of_learner = [None] * len(trajectories) if learned is None else learned
            self._append(name, *(trajectory_record(t, of) for t, of in zip(trajectories, of_learner, strict=True)))

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
        self._events.flush()
        # Whole or not at all: whoever goes on from it must not find half of it.
        self._write_whole(self.path / "scheduler.json", json.dumps(collected.state.to_json()) + "\n")

    def alarm(self, step: int, alarm: Alarm, metrics: Mapping[str, float], collected: Collected) -> Path:
        """Keep a step at which something went wrong, whatever `logging.trajectories` says; returns the folder."""
        folder = self.path / "alarms" / f"step_{step:06d}_{alarm.name}"
        self.disk.write(str(folder), lambda: folder.mkdir(parents=True, exist_ok=True))
        records = [trajectory_record(t) for group in collected.groups for t in group.trajectories]
        self._write_whole(folder / "trajectories.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        found = {
            "step": step,
            "alarm": alarm.name,
            "action": alarm.action,
            "reason": alarm.reason,
            "metrics": json_row(metrics),
        }
        self._write_whole(folder / "alarm.json", json.dumps(found, indent=2) + "\n")
        return folder

    def event(self, event: PartEvent) -> None:
        """Append to events.jsonl what happened to a part of the run. It is never cut, since it tells of no step.

        Neither waits nor raises: on a full disk the event is written with a later one, the ledger, or at the end.
        """
        self._events.append(event)

    def summary(self, result: Mapping[str, Any]) -> None:
        """Write summary.json, the run's end."""
        self._write_whole(self.path / "summary.json", json.dumps(result, indent=2) + "\n")

    def close(self) -> None:
        """Write the row that is still held, as it is; flush and close TensorBoard's file.

        Each is tried once, and what fails is told: that must neither delay nor hide why the run ends.
        """
        self._events.flush()
        try:
            if self._held is not None:
                self._held.write(waits=False)
        except Exception as error:
            self._told(f"the last row of {self.path / 'metrics.jsonl'} was not written: {error}")
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        except Exception as error:
            self._told(f"TensorBoard's files could not be closed: {error}")

    def _append(self, name: str, *records: Mapping[str, Any], waits: bool = True) -> None:
        path = self.path / name
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        if waits:
            self.disk.write(str(path), lambda: append_whole(path, data))
        else:
            self.disk.attempt(f"a line of {path}", lambda: append_whole(path, data), "it is left out")

    def _write_whole(self, path: Path, text: str) -> None:
        self.disk.write(str(path), lambda: write_whole(path, text))


def trajectory_record(trajectory: Trajectory, learned: LearnedLogprobs | None = None) -> dict[str, Any]:
    """One trajectory as JSON: everything needed to read it and to recompute its loss.

    `learner_logprobs` is there where the learner's were asked for: null for what it has not computed.
    """
    record = _record(trajectory)
    if learned is not None:
        record["learner_logprobs"] = _learner_logprobs(*learned)
    return record


def _learner_logprobs(logprobs_T: Float32Array | None, trained_T: BoolArray) -> list[float | None] | None:
    if logprobs_T is None:
        return None
    told = _rounded(logprobs_T).astype(object)
    told[~(trained_T & np.isfinite(logprobs_T))] = None
    return cast("list[float | None]", told.tolist())


def _rounded(logprobs_T: Float32Array) -> NDArray[np.float64]:
    """To six digits. All at once: Python's `round` takes ten times as long, and there are millions a step. In float64,
    whose shortest digits are those."""
    return logprobs_T.astype(np.float64).round(6)


def _record(trajectory: Trajectory) -> dict[str, Any]:
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
        "logprobs": _rounded(trajectory.logprobs).tolist(),
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


def _tensorboard(path: Path) -> TensorBoardEvents:
    # It takes a quarter of a second to import, and is optional.
    from raygym.tracking.tensorboard_events import TensorBoardEvents

    return TensorBoardEvents(path / "tensorboard")
