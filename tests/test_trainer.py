"""The training loop on stand-ins for engines, learners and rollouts: in what order, and what beside what."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console
from test_run_files import collected

from raygym.actors.session import Session
from raygym.actors.supervisor import Supervisor
from raygym.actors.trainer import Trainer
from raygym.alarms import AlarmStop
from raygym.checkpoint import CheckpointStore
from raygym.config import RunConfig
from raygym.config_file import parse_config
from raygym.console import RunConsole
from raygym.full_disk import DiskFull, DiskPatience
from raygym.lease import ReplicaState
from raygym.rollout_state import RolloutState
from raygym.run_files import RunFiles
from raygym.schedule import Collected, SchedulerState
from raygym.types import Task
from raygym.weights import Published, WeightsId

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


class Everything:
    """A session whose validation of a version ends only when something later has begun: learning, or saving."""

    def __init__(self) -> None:
        self.version, self.validating = 0, False
        self.validated: list[int] = []
        self.begun = defaultdict[str, threading.Event](threading.Event)
        self.rollouts = self.learners = self.weights = self
        self.supervisor = Supervisor()
        self.learning_fails_at = -1
        self.learned: dict[int, dict[str, float]] = {}
        """What an update tells, by its number from 1; zeros otherwise."""
        self._updates = 0

    def collect(self, step: int, progress: Callable[[str], None]) -> Collected:
        assert step == self.version
        progress("collecting")
        return replace(collected(), state=SchedulerState(version=step, cursor=10 * (step + 1)))

    def validate(self, tasks: list[Task], progress: Callable[[str], None], _: float) -> tuple[Collected, float]:
        version, self.validating = self.version, True
        progress("validating")
        assert self.begun[f"after {version}"].wait(60), "nothing goes on beside the validation"
        assert self.version == version, "the weights have changed under it"
        self.validating = False
        self.validated.append(version)
        return collected(), 1.0

    def update(self, sequences: Any) -> dict[str, float]:
        self._updates += 1
        if self._updates == self.learning_fails_at:
            raise RuntimeError("a learner is lost")
        self.begun[f"after {self.version}"].set()
        return defaultdict(float, {"tokens_trained": 1.0} | self.learned.get(self._updates, {}))

    def learned_logprobs(self) -> dict[int, Any]:
        return {0: np.full(len(collected().groups[0].trajectories[0].token_ids), -0.5, np.float32)}

    def check_alive(self) -> None:
        pass

    def check(self) -> None:
        pass

    def publish(self, version: int) -> Published:
        assert not self.validating
        self.version = version
        return Published(version, "sum", 1, 1.0, 1.0)

    def settle(self, timeout_s: float) -> list[ReplicaState]:
        return [ReplicaState("r", "n", WeightsId(self.version, "sum"), 0.0)]

    def set_version(self, version: int) -> None:
        assert version == self.version

    def snapshot(self) -> RolloutState:
        return RolloutState(SchedulerState(version=self.version, cursor=10 * self.version))

    def save_hf(self, path: str) -> None:
        (Path(path) / "config.json").write_text("{}")
        self.begun[f"after {self.version}"].set()

    def save_state(self, path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "learner.json").write_text(str(self._updates))

    def load_state(self, path: str) -> None:
        self._updates = int((Path(path) / "learner.json").read_text())


def trained(
    tmp_path: Path, everything: Everything, every: int, checkpoint_every: int = 20, **alarms: Any
) -> tuple[RunFiles, Callable[[], dict[str, Any]]]:
    config: RunConfig = parse_config(
        {
            "name": "t",
            "steps": 3,
            "runs_dir": str(tmp_path),
            "policy": {"model": "tiny"},
            "envs": [{"id": "a"}],
            "validation": {"tasks": 2, "every": every},
            "logging": {"tensorboard": False, "trajectories": False},
            "alarms": alarms,
            "checkpoint": {"every": checkpoint_every},
        }
    )
    files = RunFiles(config)
    console = RunConsole(config.steps, Console(file=io.StringIO(), force_terminal=True, width=100))
    return files, Trainer(config, cast(Session, everything), files, console).run


def rows(files: RunFiles) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (files.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_validation_overlaps_the_next_step_and_no_change_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    # Each look at the clock is a second later: what a busy machine takes for a file says nothing here.
    ticks = itertools.count()
    monkeypatch.setattr("raygym.actors.trainer.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    everything = Everything()
    files, run = trained(tmp_path, everything, every)
    summary = run()
    due = {0: [0, 3], 1: [0, 1, 2, 3], 2: [0, 2, 3]}[every]
    assert everything.validated == due
    assert summary["validation_reward"] == {str(step): 0.5 for step in due}
    assert summary["policy_version"] == 3 and Path(summary["checkpoint"]).is_dir()
    assert [row["step"] for row in rows(files)] == [0, 1, 2, 3], "one row a step, in order"
    assert [row["step"] for row in rows(files) if "val/reward" in row] == due
    for row in rows(files):
        assert ("time/validate_s" in row) == ("val/reward" in row)
        assert ("time/step_s" in row and "time/validate_wait_s" in row and "loss" in row) == (row["step"] > 0)
        assert row.get("time/log_s", 0.0) < row.get("time/step_s", 1.0) and ("time/log_s" in row) == (row["step"] > 0)


def test_a_run_that_fails_while_it_validates_keeps_the_finished_step(tmp_path: Path) -> None:
    everything = Everything()
    everything.learning_fails_at = 3
    files, run = trained(tmp_path, everything, every=2)
    with pytest.raises(RuntimeError, match="a learner is lost"):
        run()
    assert [row["step"] for row in rows(files)] == [0, 1]
    files.close()
    assert [row["step"] for row in rows(files)] == [0, 1, 2]
    assert rows(files)[2]["reward/mean"] == 0.5 and "val/reward" not in rows(files)[2]
    everything.begun["after 2"].set()


def ledger_steps(files: RunFiles) -> set[int]:
    return {json.loads(line)["step"] for line in (files.path / "ledger.jsonl").read_text().splitlines()}


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"grad_norm": math.inf}, {"loss": math.inf, "updates": 1.0}])
def test_an_update_that_is_not_finite_is_not_published(tmp_path: Path, bad: dict[str, float]) -> None:
    everything = Everything()
    everything.learned[2] = bad
    files, run = trained(tmp_path, everything, every=1)
    with pytest.raises(AlarmStop, match="not_finite at step 2"):
        run()
    files.close()
    assert everything.version == 1
    assert ledger_steps(files) == {1} and [row["step"] for row in rows(files)] == [0, 1]
    assert (files.path / "alarms/step_000002_not_finite/trajectories.jsonl").is_file()
    untouched = "updates" not in bad
    saved = files.path / "checkpoints/step_000001"
    assert saved.is_dir() == untouched, "only what is a version is saved as one"
    if untouched:
        scheduler = RolloutState.load(saved / "training_state").scheduler
        assert (scheduler.version, scheduler.cursor) == (1, 10), "the refused step's tasks are owed"


def test_an_alarm_is_the_cause_although_the_policy_cannot_be_saved(tmp_path: Path) -> None:
    class Full(Everything):
        def save_hf(self, path: str) -> None:
            super().save_hf(path)
            raise OSError("no space left")

    everything = Full()
    everything.learned[2] = {"logprob_abs_diff": 0.5}
    files, run = trained(tmp_path, everything, every=1, patience=1, logprob_drift="stop")
    with pytest.raises(AlarmStop, match="logprob_drift at step 2"):
        run()
    files.close()


def test_an_alarm_that_stops_leaves_a_whole_step_and_its_policy(tmp_path: Path) -> None:
    everything = Everything()
    everything.learned[2] = {"logprob_abs_diff": 0.5}
    files, run = trained(tmp_path, everything, every=1, patience=1, logprob_drift="stop")
    with pytest.raises(AlarmStop, match="logprob_drift at step 2"):
        run()
    files.close()
    assert everything.version == 2 and everything.validated == [0, 1, 2]
    assert ledger_steps(files) == {1, 2} and [row["step"] for row in rows(files)] == [0, 1, 2]
    assert rows(files)[2]["alarms/logprob_drift"] == 1 and rows(files)[2]["val/reward"] == 0.5
    assert (files.path / "checkpoints/step_000002").is_dir()
    assert (files.path / "alarms/step_000002_logprob_drift/alarm.json").is_file()


def test_an_alarm_that_warns_ends_nothing(tmp_path: Path) -> None:
    everything = Everything()
    everything.learned[2] = {"logprob_abs_diff": 0.5}
    files, run = trained(tmp_path, everything, every=0, patience=1)
    assert run()["policy_version"] == 3
    assert [row.get("alarms/logprob_drift") for row in rows(files)] == [None, None, 1, None]
    assert [path.name for path in (files.path / "alarms").iterdir()] == ["step_000002_logprob_drift"]


class NoRoom(Everything):
    """Learners whose first save finds the disk full, and so does that of the last step, twice."""

    def save_hf(self, path: str) -> None:
        super().save_hf(path)
        self.saves.append(self.version)
        if self.saves in ([1], [1, 2, 3], [1, 2, 3, 3]):
            raise RuntimeError("learner rank 0 of 2 failed in save_hf") from OSError(errno.ENOSPC, "No space left")

    def __init__(self) -> None:
        super().__init__()
        self.saves: list[int] = []


def test_a_full_disk_costs_a_checkpoint_but_not_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raygym.actors.trainer._RETRY_SAVING_EVERY_S", 0.01)
    everything = NoRoom()
    files, run = trained(tmp_path, everything, every=0, checkpoint_every=1)
    summary = run()
    assert everything.saves == [1, 2, 3, 3, 3], "no second try but of the last one"
    assert [entry.name for entry in sorted((files.path / "checkpoints").iterdir()) if entry.is_dir()] == [
        "step_000002",
        "step_000003",
    ]
    assert summary["checkpoint"].endswith("step_000003")
    assert ledger_steps(files) == {1, 2, 3} and [row["step"] for row in rows(files)] == [0, 1, 2, 3]


def test_a_pointer_without_room_is_told_and_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint that is whole nothing else is told, and the run's end writes the line."""
    files, run = trained(tmp_path, Everything(), 1, checkpoint_every=1)
    told: list[str] = []
    files.disk = DiskPatience(0.0, told.append)
    real, full = CheckpointStore._point, [True]

    def point(self: CheckpointStore, name: str, step: int) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, step)

    monkeypatch.setattr(CheckpointStore, "_point", point)
    with pytest.raises(DiskFull, match="checkpoints"):
        run()
    assert [line.split("; ")[0] for line in told] == [
        "the disk is full: which checkpoint is the newest and the best was not written"
    ] * 3
    assert CheckpointStore(files.path / "checkpoints").steps() == [2, 3]
    full[0] = False
    CheckpointStore(files.path / "checkpoints").retain({})
    assert (files.path / "checkpoints/latest").read_text() == "step_000003\n"
