"""The training loop on stand-ins for engines, learners and rollouts: in what order, and what beside what."""

from __future__ import annotations

import io
import json
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console
from test_run_files import collected

from raygym.actors.session import Session
from raygym.actors.trainer import Trainer
from raygym.actors.weight_sync import Published
from raygym.config import RunConfig
from raygym.config_file import parse_config
from raygym.console import RunConsole
from raygym.rollout_state import RolloutState
from raygym.run_files import RunFiles
from raygym.schedule import Collected, SchedulerState
from raygym.types import Task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


class Everything:
    """A session whose validation of a version ends only when something later has begun: learning, or saving."""

    def __init__(self) -> None:
        self.version, self.validating = 0, False
        self.validated: list[int] = []
        self.begun = defaultdict[str, threading.Event](threading.Event)
        self.rollouts = self.learners = self.weights = self
        self.learning_fails_at = -1
        self._updates = 0

    def collect(self, step: int, progress: Callable[[str], None]) -> Collected:
        assert step == self.version
        progress("collecting")
        return collected()

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
        return defaultdict(float)

    def publish(self, version: int) -> Published:
        assert not self.validating
        self.version = version
        return Published(version, "sum", 1, 1.0, 1.0)

    def set_version(self, version: int) -> None:
        assert version == self.version

    def snapshot(self) -> RolloutState:
        return RolloutState(SchedulerState(version=self.version, cursor=10 * self.version))

    def save_hf(self, path: str) -> None:
        (Path(path) / "config.json").write_text("{}")
        self.begun[f"after {self.version}"].set()

    def save_state(self, path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "updates").write_text(str(self._updates))

    def load_state(self, path: str) -> None:
        self._updates = int((Path(path) / "updates").read_text())


def trained(tmp_path: Path, everything: Everything, every: int) -> tuple[RunFiles, Callable[[], dict[str, Any]]]:
    config: RunConfig = parse_config(
        {
            "name": "t",
            "steps": 3,
            "runs_dir": str(tmp_path),
            "policy": {"model": "tiny"},
            "envs": [{"id": "a"}],
            "validation": {"tasks": 2, "every": every},
            "logging": {"tensorboard": False, "trajectories": False},
        }
    )
    files = RunFiles(config)
    console = RunConsole(config.steps, Console(file=io.StringIO(), force_terminal=True, width=100))
    return files, Trainer(config, cast(Session, everything), files, console).run


def rows(files: RunFiles) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (files.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_validation_overlaps_the_next_step_and_no_change_of_weights(tmp_path: Path, every: int) -> None:
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
