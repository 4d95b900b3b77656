"""A run whose learners are lost at every call that can find it out, on stand-ins for the cluster."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console
from test_resume import STEPS, Run, assert_exact, config_of, rows

from raygym.actors.learner_group import LearnerError
from raygym.actors.learner_recovery import train_through_losses
from raygym.actors.session import Session
from raygym.actors.supervisor import Supervisor
from raygym.config import RunConfig
from raygym.console import RunConsole
from raygym.errors import LearnerStateError
from raygym.rollout_state import RolloutState
from raygym.run_files import RunFiles
from raygym.schedule import Collected, RolloutStopped
from raygym.supervision import GivenUp

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]
CAN_FAIL = ("update", "publish", "check_alive", "save_hf", "save_state", "load_state", "restart_learners")


class Cluster(Run):
    """Its gang is lost at the calls whose numbers are told, counted over `CAN_FAIL`."""

    def __init__(self, lost_at: set[int], files: RunFiles | None = None, told: Any = None) -> None:
        super().__init__(None)
        self.calls: list[str] = []
        self.gangs = [0]
        self._lost_at = lost_at
        self._alive, self._playing = True, True
        if files is not None:
            self.supervisor = Supervisor(record=files.event, told=told)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in CAN_FAIL:
            return found

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) in self._lost_at:
                self._alive = False
            if name != "restart_learners" and not self._alive:
                raise LearnerError(f"learner rank 0 of 1 failed in {name}: it died")
            done = found(*args)
            if not self._alive:
                raise LearnerError("learner rank 0 of 1 failed in setup: it died")
            return done

        return call

    def collect(self, step: int, progress: Any) -> Collected:
        assert self._playing and step == self.version, "what is played is played by the weights of that step"
        progress("collecting")
        return super().collect(step, progress)

    def end_learners(self) -> None:
        self._alive = False

    def stop_playing(self) -> None:
        self._playing = False

    def rewind(self, to: RolloutState) -> None:
        assert not self._playing, "the manager before was not stopped"
        self._playing, self.cursor = True, to.scheduler.cursor

    def restart_learners(self) -> None:
        number = len(self.calls)
        self._alive, self.made = number not in self._lost_at, []
        self.gangs.append(number)


def trained(config: RunConfig, cluster: Cluster, files: RunFiles) -> dict[str, Any]:
    console = RunConsole(config.steps, Console(file=io.StringIO()))
    try:
        summary = train_through_losses(config, cast(Session, cluster), files, console, None)
    finally:
        files.close()
    files.summary(summary)
    return summary


def supervised(config: RunConfig, lost_at: set[int], **budgets: Any) -> tuple[Cluster, dict[str, Any]]:
    files = RunFiles(config)
    cluster = Cluster(lost_at)
    cluster.supervisor = Supervisor(config.supervision, files.event)
    return cluster, trained(config, cluster, files)


def losses(run: Path) -> list[str]:
    return [event["what"] for event in rows(run / "events.jsonl")]


def test_wherever_the_learners_are_lost_nothing_is_skipped_and_nothing_comes_twice(tmp_path: Path) -> None:
    whole, _ = supervised(config_of(tmp_path / "whole"), set())
    assert len(whole.gangs) == 1
    for number in range(1, len(whole.calls) + 1):
        config = config_of(tmp_path / f"{number}")
        cluster, summary = supervised(config, {number})
        assert_exact(config.run_dir)
        assert cluster.made == whole.made == list(range(STEPS)), (
            "each step was learned once, by what was learned before"
        )
        assert summary["policy_version"] == STEPS and summary["restarts"] == {"learner": 1}
        assert losses(config.run_dir) == ["lost", "restarted", "recovered"]
        (counted,) = [row for row in rows(config.run_dir / "metrics.jsonl") if "supervision/learner_restarts" in row]
        assert counted["supervision/recovery_s_max"] >= 0


@pytest.mark.parametrize("lost_at", [{3, 5}, {3, 4}, {3, 4, 5}, {10, 12, 13}])
def test_learners_that_are_lost_while_they_recover_are_one_more_loss(tmp_path: Path, lost_at: set[int]) -> None:
    config = config_of(tmp_path)
    cluster, _ = supervised(config, lost_at)
    assert_exact(config.run_dir)
    assert cluster.made == list(range(STEPS)) and len(cluster.gangs) == 1 + len(lost_at)
    assert losses(config.run_dir).count("lost") == len(lost_at)
    assert losses(config.run_dir)[-1] == "recovered"


def test_without_a_checkpoint_it_begins_again_with_the_starting_policy(tmp_path: Path) -> None:
    config = config_of(tmp_path, checkpoint={"every": 0, "save_final": False})
    cluster, _ = supervised(config, {7})
    metrics, ledger = (rows(config.run_dir / f"{name}.jsonl") for name in ("metrics", "ledger"))
    assert [row["step"] for row in metrics] == list(range(STEPS + 1)) and metrics[0]["val/reward"] == 0.5
    assert [(line["step"], line["task"]) for line in ledger] == [(1 + i // 2, i) for i in range(2 * STEPS)]
    assert cluster.made == list(range(STEPS)) and "load_state" not in cluster.calls
    assert cluster.validated in ([0, 2, 4], [0, 2, 2, 4]), "that of the starting policy was whole"
    (aside,) = (config.run_dir / "discarded").iterdir()
    assert aside.name.endswith("after-step-0") and (aside / "ledger.jsonl").is_file()


def test_too_many_losses_end_the_run_with_the_cause(tmp_path: Path) -> None:
    config = config_of(tmp_path, supervision={"learner_restarts": 2})
    with pytest.raises(GivenUp, match=r"^learner rank 0 of 1 failed in \w+: it died\. .*learner_restarts allows 2$"):
        supervised(config, set(range(3, 1000)))
    assert losses(config.run_dir) == ["lost", "lost", "lost", "given_up"]


def test_a_state_that_no_gang_can_load_is_no_loss(tmp_path: Path) -> None:
    class Refusing(Cluster):
        def load_state(self, path: str) -> None:
            raise LearnerStateError("it is of another policy")

    config = config_of(tmp_path)
    files = RunFiles(config)
    with pytest.raises(LearnerStateError, match="another policy"):
        trained(config, Refusing({9}, files, print), files)
    assert losses(config.run_dir) == ["lost", "restarted"]


def test_damaged_checkpoints_end_the_run_with_the_loss_first(tmp_path: Path) -> None:
    class Damaging(Cluster):
        def end_learners(self) -> None:
            super().end_learners()
            for manifest in config.run_dir.glob("checkpoints/step_*/manifest.json"):
                manifest.write_text("")

    config = config_of(tmp_path)
    files = RunFiles(config)
    with pytest.raises(GivenUp, match=r"^learner rank 0 of 1 failed in .*none of its checkpoints can be used"):
        trained(config, Damaging({12}, files, print), files)


def test_a_validation_that_is_played_then_is_ended_and_played_again(tmp_path: Path) -> None:
    """Its thread still waits for the manager that is ended; the row is written once, with the second one's result."""

    class Slow(Cluster):
        def __init__(self) -> None:
            super().__init__({3})
            self.stopped = threading.Event()

        def validate(self, tasks: Any, progress: Any, deadline_s: float) -> Any:
            if len(self.gangs) == 1:
                assert self.stopped.wait(60)
                raise RolloutStopped("the run is being ended")
            return super().validate(tasks, progress, deadline_s)

        def stop_playing(self) -> None:
            super().stop_playing()
            self.stopped.set()

    config = config_of(tmp_path)
    files, cluster = RunFiles(config), Slow()
    cluster._lost_at = {2}  # the first update, beside the validation of the starting policy
    trained(config, cluster, files)
    assert cluster.calls[1] == "update" and cluster.validated == [0, 2, 4]
    assert_exact(config.run_dir)
    (aside,) = (config.run_dir / "discarded").iterdir()
    assert [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()] == [{"step": 0}]


def test_a_gang_that_is_lost_before_the_first_checkpoint_leaves_no_row_of_step_0(tmp_path: Path) -> None:
    """Without validation, an undisturbed run has none either."""
    found = []
    for name, lost_at in (("whole", set[int]()), ("disturbed", {2})):
        config = config_of(tmp_path / name, validation={"tasks": 0}, checkpoint={"every": 4})
        supervised(config, lost_at)
        found.append([row["step"] for row in rows(config.run_dir / "metrics.jsonl")])
    assert found == [list(range(1, STEPS + 1))] * 2
