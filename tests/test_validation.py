"""Validation beside training: what may happen at the same time, and when its row is written."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_run_files import collected

from raygym.config import RunConfig
from raygym.config_file import parse_config
from raygym.console import RunConsole
from raygym.run_files import RunFiles
from raygym.schedule import Collected, RolloutStopped
from raygym.types import Task
from raygym.validation import ValidationStream


class Played:
    """Stands for the rollouts: each validation ends when the test says so."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.asked: tuple[list[Task], float] | None = None
        self.error: Exception | None = None

    def __call__(
        self, tasks: list[Task], progress: Callable[[str], None], deadline_s: float
    ) -> tuple[Collected, float]:
        self.asked = tasks, deadline_s
        progress("1 of 3 validation tasks done")
        self.begun.set()
        assert self.may_end.wait(30)
        if self.error:
            raise self.error
        return collected(), 1.5


class Run:
    """A run's files and console, and the stream on `Played`."""

    def __init__(self, config: RunConfig) -> None:
        self.files, self.played, self.progress = RunFiles(config), Played(), list[str]()
        self.output = io.StringIO()
        console = RunConsole(config.steps, Console(file=self.output, width=100))
        self.stream = ValidationStream(config, self.played, self.files, console, self.progress.append)

    def rows(self) -> list[dict[str, Any]]:
        file = self.files.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def trajectories(self) -> list[str]:
        return sorted(file.name for file in (self.files.path / "trajectories").iterdir())


def parsed(tmp_path: Path, **validation: Any) -> RunConfig:
    return parse_config(
        {
            "name": "t",
            "steps": 5,
            "runs_dir": str(tmp_path),
            "policy": {"model": "tiny"},
            "envs": [{"id": "a"}],
            "validation": {"tasks": 3, "every": 2, "deadline_s": 9.0, **validation},
            "logging": {"tensorboard": False},
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(parsed(tmp_path))
    yield run
    run.played.may_end.set()


def test_it_is_due_at_the_start_at_the_end_and_every_so_often(tmp_path: Path) -> None:
    for changes, due in [({}, [0, 2, 4, 5]), ({"every": 0}, [0, 5]), ({"tasks": 0}, [])]:
        stream = Run(parsed(tmp_path, **changes)).stream
        assert [step for step in range(6) if stream.due(step)] == due


def test_it_plays_beside_the_caller_and_its_row_is_written_once_and_whole(run: Run) -> None:
    run.stream.start(2, run.files.hold(2, {"loss": 0.5}))
    assert run.played.begun.wait(30)
    assert run.played.asked is not None
    tasks, deadline_s = run.played.asked
    assert [(task.index, task.split) for task in tasks] == [(i, "validation") for i in range(3)] and deadline_s == 9.0
    assert run.rows() == [] and run.stream.rewards == {} and run.progress == ["1 of 3 validation tasks done"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run.stream.wait)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.05)
        run.played.may_end.set()
        waiting.result(timeout=30)
    (row,) = run.rows()
    assert (row["step"], row["loss"], row["val/reward"], row["time/validate_s"]) == (2, 0.5, 0.5, 1.5)
    assert run.stream.rewards == {2: 0.5} and run.trajectories() == ["validation_000002.jsonl"]
    assert "validation after step 2: reward 0.500" in run.output.getvalue()
    run.stream.wait()  # there is none: at once
    run.files.close()
    assert len(run.rows()) == 1


def test_a_run_that_ends_before_its_validation_keeps_the_row(run: Run) -> None:
    run.stream.start(2, run.files.hold(2, {"loss": 0.5}))
    run.files.close()
    assert run.rows() == [{"step": 2, "loss": 0.5}]
    run.played.may_end.set()
    run.stream.wait()
    assert run.rows() == [{"step": 2, "loss": 0.5}], "what comes too late is not a second row"


def test_a_validation_that_cannot_be_played_stops_the_run_where_it_is_waited_for(run: Run) -> None:
    run.played.error = RolloutStopped("environment 'a' is hopeless")
    run.stream.start(2, run.files.hold(2, {"loss": 0.5}))
    run.played.may_end.set()
    with pytest.raises(RolloutStopped, match="hopeless"):
        run.stream.wait()
    run.files.close()
    assert run.rows() == [{"step": 2, "loss": 0.5}]
