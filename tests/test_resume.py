"""Killed at every moment and started again, on stand-ins for the cluster: each step is made once, as its files tell."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run_files import collected, trajectory
from test_trainer import Everything
from tiers import LONG

from raygym.actors.session import Session
from raygym.actors.trainer import Trainer
from raygym.config import ConfigError, RunConfig
from raygym.config_file import load_config, parse_config
from raygym.console import RunConsole
from raygym.resume import FinishedError, ResumePoint, checkpoint_store, only_writer, resume_point
from raygym.run_cut import cut_lines
from raygym.run_files import RunFiles
from raygym.schedule import Collected, SchedulerState
from raygym.types import Group, Task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
STEPS = 4


class Killed(BaseException):
    """Stands for the end of the process: nothing that would clean up after an error may run."""


class Run(Everything):
    """A cluster whose steps have tasks of their own, and whose policy remembers which steps it learned from."""

    def __init__(self, resumed: ResumePoint | None) -> None:
        super().__init__()
        self.version = self.delivered = resumed.step if resumed else 0
        self.cursor = resumed.rollouts.scheduler.cursor if resumed else 0
        self.made: list[int] = []

    def collect(self, step: int, progress: Callable[[str], None]) -> Collected:
        tasks = [Task(index, "a", index) for index in (self.cursor, self.cursor + 1)]
        self.cursor += 2
        groups = (Group(f"train-{t.index}", t, tuple(trajectory(t, e, float(e)) for e in range(2))) for t in tasks)
        self._step = step
        return Collected(tuple(groups), (), {}, state=SchedulerState(cursor=self.cursor))

    def validate(self, tasks: list[Task], progress: Callable[[str], None], _: float) -> tuple[Collected, float]:
        self.validated.append(self.version)
        return collected(), 1.0

    def update(self, sequences: Any) -> dict[str, float]:
        self.made.append(self._step)
        return super().update(sequences)

    def snapshot(self) -> Any:
        whole = super().snapshot()
        return type(whole)(SchedulerState(version=self.version, cursor=self.cursor))

    def save_state(self, path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "learner.json").write_text(json.dumps(self.made))

    def load_state(self, path: str) -> None:
        self.made = json.loads((Path(path) / "learner.json").read_text())


def config_of(tmp_path: Path, **changes: Any) -> RunConfig:
    data = {
        "name": "t",
        "steps": STEPS,
        "runs_dir": str(tmp_path),
        "policy": {"model": "tiny"},
        "envs": [{"id": "a"}],
        "validation": {"tasks": 2, "every": 2},
        "checkpoint": {"every": 1, "keep_last": 2, "keep_best": 1},
        "logging": {"tensorboard": False},
    }
    return parse_config(data | changes)


def started(config: RunConfig, told: Callable[[str], None] = print, **options: Any) -> tuple[Run, RunFiles]:
    """One start of `raygym train`, to its end. Closes nothing where it is killed."""
    resumed = resume_point(config, allow_change=options.get("allow_change", False), told=told)
    files = RunFiles(config, resumed)
    run = Run(resumed)
    console = RunConsole(config.steps, Console(file=io.StringIO()))
    trainer = Trainer(config, cast(Session, run), files, console, resumed)
    try:
        summary = trainer.run()
    finally:
        trainer._validation._thread.shutdown()  # a process that is killed has no threads any more
    files.close()
    files.summary(summary)
    return run, files


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def killed_after(patch: pytest.MonkeyPatch, limit: int) -> Iterator[list[int]]:
    """So many changes of the disk, in whichever thread, are made; the next one, and all after it, are not.

    A line that is just being appended is left half-written.
    """
    calls = [0]

    def alive() -> bool:
        calls[0] += 1
        return calls[0] <= limit

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if not alive():
                raise Killed
            return real(*args, **kwargs)

        return call

    def append(self: RunFiles, name: str, *records: Mapping[str, Any], waits: bool = True) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        whole = alive()
        if whole or calls[0] == limit + 1:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(text if whole else text[: 2 * len(text) // 3])
        if not whole:
            raise Killed

    changing = [(os, "mkdir"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "fsync")]
    changing += [(Path, "write_text"), (Path, "write_bytes"), (shutil, "rmtree")]
    with patch.context() as patched:
        for owner, name in changing:
            patched.setattr(owner, name, counted(getattr(owner, name)))
        patched.setattr(RunFiles, "_append", append)
        with suppress(Killed):
            yield calls


def assert_exact(path: Path) -> None:
    metrics = rows(path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert [row["step"] for row in metrics if "val/reward" in row] == [0, 2, 4]
    ledger = rows(path / "ledger.jsonl")
    assert [(line["step"], line["task"]) for line in ledger] == [(1 + i // 2, i) for i in range(2 * STEPS)]
    for step in range(1, STEPS + 1):
        played = [record["task"] for record in rows(path / f"trajectories/step_{step:06d}.jsonl")]
        assert played == [2 * step - 2, 2 * step - 2, 2 * step - 1, 2 * step - 1]
    for step in (0, 2, 4):
        assert len(rows(path / f"trajectories/validation_{step:06d}.jsonl")) == 4
    assert json.loads((path / "scheduler.json").read_text())["cursor"] == 2 * STEPS
    summary = json.loads((path / "summary.json").read_text())
    assert summary["policy_version"] == STEPS and summary["validation_reward"] == {"0": 0.5, "2": 0.5, "4": 0.5}
    assert json.loads((path / "checkpoints/step_000004/training_state/learner.json").read_text()) == list(range(STEPS))
    names = {entry.name for entry in (path / "checkpoints").iterdir()}
    assert names == {"latest", "best", "step_000003", "step_000004"}


def test_a_kill_at_any_moment_costs_no_step_and_repeats_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 0
    while True:
        config = config_of(tmp_path / f"{limit}")
        # Killed, killed again while it starts anew or goes on, and then left alone.
        with killed_after(monkeypatch, limit) as calls:
            started(config)
        done = calls[0] <= limit
        if not done:
            with killed_after(monkeypatch, limit // 3):
                started(config)
        with monkeypatch.context():
            try:
                started(config)
            except FinishedError:
                assert done or (config.run_dir / "summary.json").exists()
        assert_exact(config.run_dir)
        if done:
            break
        limit += 1 if LONG else 9
    assert limit > 100, "what changes the disk was not seen"


def test_what_was_done_after_the_checkpoint_is_kept_aside(tmp_path: Path) -> None:
    config = config_of(tmp_path, logging={"tensorboard": True}, checkpoint={"every": 2, "save_final": False})
    _, files = started(config)
    (files.path / "summary.json").unlink()  # as if it had been killed before its end
    store = checkpoint_store(config)
    (store.path_of(4) / "config.json").write_text("[]")
    told: list[str] = []
    run, files = started(config, told.append)
    assert told == ["checkpoint step_000004 is skipped: config.json has another checksum than when it was written"]
    assert run.made == [0, 1, 2, 3] and run.validated == [4]
    assert files.discarded is not None and files.discarded.parent == files.path / "discarded"
    assert [row["step"] for row in rows(files.discarded / "metrics.jsonl")] == [3, 4]
    assert [line["task"] for line in rows(files.discarded / "ledger.jsonl")] == [4, 5, 6, 7]
    assert {path.name for path in (files.discarded / "trajectories").iterdir()} == {
        "step_000003.jsonl", "step_000004.jsonl", "validation_000004.jsonl"
    }  # fmt: skip
    assert (files.discarded / "checkpoints/step_000004/config.json").read_text() == "[]"
    assert [row["step"] for row in rows(files.path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    events = EventAccumulator(str(files.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4], "each once"


def test_a_validation_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, checkpoint={"every": 2, "save_final": False}, steps=3, validation={"tasks": 2, "every": 2}
    )
    started(config)
    # As a run leaves it that was stopped while it validated step 2: the row is there, the validation is not.
    path = config.run_dir / "metrics.jsonl"
    kept = [row for row in rows(path) if row["step"] <= 2]
    kept[-1] = {key: value for key, value in kept[-1].items() if not key.startswith("val/")}
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    (config.run_dir / "summary.json").unlink()
    run, _ = started(config)
    assert run.validated == [2, 3]
    assert [(row["step"], "val/reward" in row) for row in rows(path)] == [(0, True), (1, False), (2, True), (3, True)]
    assert len(rows(config.run_dir / "trajectories/validation_000002.jsonl")) == 4


def test_a_run_without_a_checkpoint_is_moved_aside(tmp_path: Path) -> None:
    config = config_of(tmp_path, checkpoint={"every": 0, "save_final": False})
    started(config)
    _, files = started(config)
    assert files.moved_to is not None and (files.moved_to / "summary.json").exists()
    assert files.discarded is None


def test_a_finished_run_says_so_and_more_steps_go_on(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    started(config)
    with pytest.raises(FinishedError, match=r"t has made its 4 steps; raise steps to go on, or use --fresh"):
        started(config)
    more = config_of(tmp_path, steps=6)
    told: list[str] = []
    run, files = started(more, told.append)
    assert told == ["changed: steps: 4 -> 6"]
    assert run.made == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(files.path / "metrics.jsonl")] == list(range(7))
    assert load_config(files.path / "config.yaml") == more
    with pytest.raises(FinishedError, match="has made its 4 steps"):
        started(config)


def test_a_config_that_changes_the_result_has_to_be_allowed(tmp_path: Path) -> None:
    started(config_of(tmp_path, steps=2))
    changed = config_of(tmp_path, learner={"lr": 0.5, "num_learners": 2})
    with pytest.raises(ConfigError, match=r"learner.lr: 1e-06 -> 0.5 \(key: old -> new\)") as raised:
        started(changed)
    assert "num_learners" not in str(raised.value) and "--allow-config-change" in str(raised.value)
    told: list[str] = []
    run, _ = started(changed, told.append, allow_change=True)
    assert run.made == [0, 1, 2, 3]
    assert told == [
        "changed: steps: 2 -> 4",
        "changed: learner.num_learners: 1 -> 2",
        "changed: learner.lr: 1e-06 -> 0.5",
    ]


def test_only_one_process_writes_a_run(tmp_path: Path) -> None:
    with only_writer(tmp_path / "runs/t"):
        with (
            pytest.raises(ConfigError, match=r"runs/t is being trained by another process"),
            only_writer(tmp_path / "runs/t"),
        ):
            pass
        with only_writer(tmp_path / "runs/u"):
            pass
    with only_writer(tmp_path / "runs/t"):
        pass


def test_a_folder_that_cannot_be_written_is_told_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nothing")):
        with (
            pytest.raises(ConfigError, match=rf"^runs_dir: {parent} cannot be written to \(.*\); expected a folder"),
            only_writer(parent / "t"),
        ):
            pass


def test_a_file_that_somebody_has_edited_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"ledger.jsonl: line 2 is no JSON object.*--fresh"):
        cut_lines(path, lambda row: True, tmp_path / "discarded")
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert cut_lines(path, lambda row: row["step"] < 2, tmp_path / "discarded") == [{"step": 1}]
    assert path.read_text() == '{"step": 1}\n'
    assert (tmp_path / "discarded/ledger.jsonl").read_text() == '{"step": 2}\n{"st'
