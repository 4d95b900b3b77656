"""Trackers hold what metrics.jsonl holds, go on with a run, and never harm it."""

from __future__ import annotations

import importlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_file import history

from raygym.checkpoint import Checkpoint
from raygym.config import RunConfig
from raygym.config_change import changes
from raygym.config_file import parse_config
from raygym.histogram import Histogram
from raygym.resume import ResumePoint, checkpoint_store
from raygym.rollout_state import RolloutState
from raygym.run_files import RunFiles
from raygym.run_row import Row
from raygym.tracking import background
from raygym.tracking.background import BackgroundTracker
from raygym.tracking.tracker import Outcome
from raygym.tracking.tracking import Tracking

Numbers = dict[tuple[str, int], float]


def config_of(folder: Path, **logging: Any) -> RunConfig:
    return parse_config(
        {"name": "t", "steps": 9, "runs_dir": str(folder), "policy": {"model": "tiny"}, "envs": [{"id": "a"}],
         "logging": logging}
    )  # fmt: skip


def row(step: int) -> Row:
    return {
        "reward/mean": step / 7,
        "reward/mean/a": step / 3,
        "tokens/generated": 100 * step,
        "env/räuber @ home/step_s": 0.25,
        "loss": math.nan if step == 2 else -1.5 * step,
        "sync/checksum": "abc",
        "advantage/histogram": Histogram.of([-1.0, 0.5, 2.0], [-0.5, 0.0, 0.75]),
    }


def in_jsonl(folder: Path) -> Numbers:
    lines = [json.loads(line) for line in (folder / "t/metrics.jsonl").read_text().splitlines()]
    return {
        (name, line["step"]): value
        for line in lines
        for name, value in line.items()
        if isinstance(value, int | float) and name != "step"
    }


def in_tensorboard(folder: Path) -> Numbers:
    events = EventAccumulator(str(folder / "t/tensorboard"))
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    return {(name, e.step): e.value for name, found in scalars.items() for e in found if math.isfinite(e.value)}


def in_wandb(folder: Path) -> Numbers:
    """Of all processes; of a step that was logged again, what it was last."""
    found: Numbers = {}
    for path in sorted((folder / "t/wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        for line in history(path):
            step = line["step"]
            for name, value in line.items():
                if isinstance(value, int | float) and not name.startswith("_") and name != "step":
                    found[name, step] = value
    return found


def in_mlflow(folder: Path) -> Numbers:
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run_id = json.loads((folder / "t/tracking.json").read_text())["mlflow"]["id"]
    names = client.get_run(run_id).data.metrics
    values = [m for name in names for m in client.get_metric_history(run_id, name)]
    return {(m.key, m.step): m.value for m in sorted(values, key=lambda m: m.timestamp)}


def approximately(numbers: Numbers) -> Mapping[tuple[str, int], Any]:
    return {key: pytest.approx(value, rel=1e-6) for key, value in numbers.items()}


@pytest.mark.slow  # MLflow makes its database by a hundred migrations
@pytest.mark.timeout(600)
def test_all_hold_the_numbers_of_metrics_jsonl_also_after_a_kill_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine they take longer than a run waits for them.
    monkeypatch.setattr("raygym.tracking.wandb_tracker._FINISH_TIMEOUT_S", 200.0)
    config = config_of(tmp_path, wandb={"mode": "offline", "tags": ["x"]}, mlflow={})
    told: list[str] = []

    files = RunFiles(config)
    tracking = Tracking(config, told.append, close_timeout_s=250)
    files.follow(tracking.log)
    for step in range(3):
        files.metrics(step, row(step))
    tracking.close(Outcome.FAILED)
    files.metrics(3, row(3))  # written, and the process killed before anybody else had it
    files.close()
    before = json.loads((tmp_path / "t/tracking.json").read_text())
    assert [before[name]["step"] for name in ("wandb", "mlflow")] == [2, 2]

    with checkpoint_store(config).writing(3, {}):
        pass
    checkpoint = Checkpoint(checkpoint_store(config).path_of(3), 3, {})
    resumed = ResumePoint(checkpoint, RolloutState(), row(3), validated=False)
    files = RunFiles(config, resumed)
    tracking = Tracking(config, told.append, close_timeout_s=250)
    tracking.catch_up(files.rows)
    files.follow(tracking.log)
    files.metrics(4, row(4))
    files.close()
    tracking.close(Outcome.FINISHED)

    after = json.loads((tmp_path / "t/tracking.json").read_text())
    assert [after[name]["id"] for name in after] == [before[name]["id"] for name in after], "the same runs"
    numbers = in_jsonl(tmp_path)
    assert {step for _, step in numbers} == {0, 1, 2, 3, 4} and ("loss", 2) not in numbers
    assert in_tensorboard(tmp_path) == approximately(numbers)
    assert in_wandb(tmp_path) == approximately(numbers)
    renamed = {(name.replace("@", "_"), step): value for (name, step), value in numbers.items()}
    assert in_mlflow(tmp_path) == approximately(renamed)
    assert told == []

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(after["mlflow"]["id"])
    assert run.info.status == "FINISHED" and run.info.run_name == "t"
    assert run.data.params["rollout.group_size"] == "8" and run.data.params["envs.0.id"] == "a"


class Fake:
    """A tracker that fails when it is told to."""

    id = "fake-1"

    def __init__(self, fails: Callable[[int], bool] = lambda step: False) -> None:
        self.fails = fails
        self.taken: list[int] = []
        self.ended: Outcome | None = None

    def log(self, step: int, row: Row) -> None:
        if self.fails(step):
            raise ConnectionError("no\nroute")
        self.taken.append(step)

    def close(self, outcome: Outcome) -> None:
        self.ended = outcome


@pytest.mark.parametrize("error", [ImportError("x is not installed"), SystemExit(1), KeyboardInterrupt()])
def test_a_tracker_that_cannot_connect_is_told_once(error: BaseException) -> None:
    told: list[str] = []

    def connect() -> Any:
        raise error

    tracker = BackgroundTracker("X", connect, told.append)
    for step in range(3):
        tracker.log(step, {})
    tracker.close(Outcome.FINISHED, 5)
    assert len(told) == 1 and "X gets no metrics of this run" in told[0] and type(error).__name__ in told[0]


class Tracked:
    """A fake behind its thread, row by row: each is passed on before the next one."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails, self.told, self.noted = fails, list[str](), list[int]()
        self.tried = threading.Semaphore(0)
        self.fake = Fake(self._asked)
        self.tracker = BackgroundTracker(
            "X", lambda: self.fake, self.told.append, lambda _, step: self.noted.append(step)
        )

    def _asked(self, step: int) -> bool:
        refuses = self.fails(step)
        if step == self.newest:
            self.tried.release()
        return refuses

    def log(self, *steps: int) -> Tracked:
        for self.newest in steps:
            self.tracker.log(self.newest, {})
            assert self.tried.acquire(timeout=20)
        return self

    def end(self) -> None:
        self.newest = -1
        self.tracker.close(Outcome.INTERRUPTED, 20)
        assert self.fake.ended is Outcome.INTERRUPTED


def test_rows_that_were_refused_are_sent_later_in_order() -> None:
    broken = True
    run = Tracked(lambda step: step >= 1 and broken).log(0, 1, 2, 3)
    broken = False
    run.log(4).end()
    assert run.fake.taken == [0, 1, 2, 3, 4]
    assert (run.noted[0], run.noted[-1]) == (0, 4)
    assert len(run.told) == 1
    assert "X does not take the metrics of step 1; later ones are tried (ConnectionError: no route)" in run.told[0]


def test_a_row_that_is_always_refused_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    run = Tracked(lambda step: step in (1, 2)).log(*range(14))
    run.end()
    assert run.fake.taken == [0, *range(3, 14)]
    assert run.noted == [0, 12, 13], "no step that comes after one that waits"
    assert len(run.told) == 2 and "step 1;" in run.told[0]
    assert "X refused the metrics of step 1 10 times while it took others" in run.told[1]
    assert len([record for record in caplog.records if record.exc_info]) == 1, "one traceback"


def test_what_waits_for_a_tracker_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_MOST_WAITING", 3)
    broken, asked = True, list[int]()

    def fails(step: int) -> bool:
        asked.append(step)
        return broken

    run = Tracked(fails).log(*range(10))
    assert len(asked) < 2 * 10, "not all of them again and again, where nothing is taken"
    broken = False
    run.log(10).end()
    assert run.fake.taken == [7, 8, 9, 10]
    assert len(run.told) == 2 and "more than 3 rows wait for X" in run.told[1]
    assert run.noted == [-1], "who goes on with the run sends what was left out"


def test_what_waits_for_a_call_that_hangs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_MOST_WAITING", 3)
    hangs, goes_on = threading.Event(), threading.Event()
    told, noted = list[str](), list[int]()

    def hang(step: int) -> bool:
        hangs.set()
        return not goes_on.wait(20)

    fake = Fake(hang)
    tracker = BackgroundTracker("X", lambda: fake, told.append, lambda _, step: noted.append(step))
    tracker.log(0, {})
    assert hangs.wait(20)
    for step in range(1, 10):
        tracker.log(step, {})
    goes_on.set()
    tracker.close(Outcome.FINISHED, 20)
    assert fake.taken == [0, 1, 2, 3]
    assert len(told) == 1 and "the newest are left out" in told[0]
    assert noted[-1] == 3, "who goes on with the run sends the others"


def test_steps_that_are_made_again_are_noted_again() -> None:
    run = Tracked(lambda step: False).log(5, 6, 7, 6, 7)
    run.end()
    assert run.noted == [5, 6, 7, 6, 7]
    broken = False
    run = Tracked(lambda step: broken).log(5, 6)
    broken = True
    run.log(7, 6)
    broken = False
    run.end()
    assert run.fake.taken == [5, 6, 6], "what waited of step 7 was not true any more"
    assert run.noted == [5, 6, 5, 6], "the new row of step 6 was not taken at first"


def test_a_tracker_that_hangs_keeps_nobody_waiting() -> None:
    told: list[str] = []
    released = threading.Event()
    tracker = BackgroundTracker("X", lambda: (released.wait(30) and Fake()) or Fake(), told.append)
    began = time.monotonic()
    tracker.log(1, {})
    tracker.close(Outcome.FINISHED, 0.1)
    assert time.monotonic() - began < 20, "it waited for what hangs for 30 s"
    assert told == ["X has not taken all rows within 0.1 s; metrics.jsonl has them"]
    released.set()


@pytest.mark.parametrize(("section", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_package_that_is_missing_is_named(
    section: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    told: list[str] = []
    config = config_of(tmp_path, **{section: {}})
    tracking = Tracking(config, told.append)
    tracking.log(0, row(0))
    tracking.close(Outcome.FINISHED)
    assert len(told) == 1 and f"pip install 'raygym[{section}]'" in told[0]


def test_wandb_without_a_key_asks_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = importlib.import_module("wandb")
    monkeypatch.setattr(wandb, "login", lambda **options: options["prompt"])
    told: list[str] = []
    tracking = Tracking(config_of(tmp_path, wandb={"mode": "online"}), told.append)
    tracking.close(Outcome.FINISHED)
    assert len(told) == 1 and "WANDB_API_KEY" in told[0] and "mode=offline" in told[0]


def test_a_server_that_is_not_there_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told: list[str] = []
    tracking = Tracking(config_of(tmp_path, mlflow={"tracking_uri": "http://127.0.0.1:9"}), told.append)
    tracking.log(0, row(0))
    tracking.close(Outcome.FINISHED)
    assert len(told) == 1 and "MLflow gets no metrics of this run" in told[0]


def test_who_is_beside_and_raises_gets_no_more(tmp_path: Path) -> None:
    told: list[str] = []
    seen: list[int] = []

    def broken(step: int, row: Row) -> None:
        seen.append(step)
        raise RuntimeError("no agent")

    tracking = Tracking(config_of(tmp_path), told.append, [broken])
    tracking.log(1, row(1))
    tracking.log(2, row(2))
    tracking.close(Outcome.FINISHED)
    assert seen == [1] and len(told) == 1 and "no agent" in told[0]


def test_a_damaged_tracking_json_begins_anew(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "t").mkdir()
    for text in ("", "[]", '{"wandb": 3}', '{"wandb": {"id": "x"}}'):
        (tmp_path / "t/tracking.json").write_text(text)
        Tracking(config, print).close(Outcome.FINISHED)


def test_trackers_change_no_result(tmp_path: Path) -> None:
    old, new = (config_of(tmp_path, **logging) for logging in ({}, {"wandb": {}, "mlflow": {}, "opentelemetry": True}))
    assert all(change.harmless for change in changes(old.model_dump(mode="json"), new.model_dump(mode="json")))
