"""What a run leaves behind, and the scalars computed from its rollouts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from table_engine import TableEngine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raygym.alarms import Alarm
from raygym.batch import train_sequences
from raygym.checkpoint import Checkpoint
from raygym.config import LearnerConfig, RunConfig
from raygym.config_file import load_config, parse_config
from raygym.histogram import Histogram
from raygym.method_config import MethodConfig
from raygym.metrics import learn_metrics, rollout_metrics, sync_metrics, validation_metrics
from raygym.model_flops import ModelFlops
from raygym.open_group import GroupState
from raygym.resume import ResumePoint, checkpoint_store
from raygym.rollout_state import RolloutState
from raygym.run_files import LearnedLogprobs, RunFiles, trajectory_record
from raygym.schedule import Collected, Dropped, SchedulerState
from raygym.types import EpisodeStatus, Group, Sampling, Task, Trajectory, Turn
from raygym.update import PolicyUpdate
from raygym.weights import Published


def trajectory(task: Task, episode: int, reward: float, *, version: int = 3, turns: int = 2) -> Trajectory:
    length = 4 * turns
    mask = np.tile([False, False, True, True], turns)
    return Trajectory(
        task=task,
        group_id=f"train-{task.index}",
        episode=episode,
        attempt=0,
        status=EpisodeStatus.TERMINATED,
        token_ids=np.arange(length, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        weight_versions=np.where(mask, version, -1).astype(np.int32),
        turns=tuple(Turn(4 * i + 2, 4 * i + 4, reward / turns, "stop", 0.1, 0.01) for i in range(turns)),
        reward=reward,
        messages=({"role": "user", "content": "hi"},),
        sampling=Sampling(),
        drifted=episode == 1,
    )


def collected() -> Collected:
    tasks = [Task(0, "a", 5), Task(1, "b", 6)]
    groups = tuple(
        Group(f"train-{task.index}", task, tuple(trajectory(task, e, rewards[e]) for e in range(2)))
        for task, rewards in zip(tasks, [(0.0, 1.0), (0.5, 0.5)], strict=True)
    )
    return Collected(
        groups,
        (Dropped(Task(2, "a", 7), "train-2", "env_error: boom"),),
        {"env_error": 4},
        state=SchedulerState(cursor=4, delivered=2, groups=(GroupState(3, -1, 0),), failures=(("a", "env_lost", 1),)),
    )


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    data = {"name": "t", "steps": 1, "runs_dir": str(tmp_path), "policy": {"model": "tiny"}, "envs": [{"id": "a"}]}
    return parse_config(data)


def test_rollout_metrics() -> None:
    metrics = rollout_metrics(collected(), version=4)
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/mean/a"] == metrics["reward/mean/b"] == 0.5
    assert metrics["tokens/generated"] == 16
    assert metrics["tokens/drift_rate"] == 0.5
    assert metrics["policy/staleness_max"] == 1
    assert metrics["episodes/failed/env_error"] == 4
    assert (metrics["groups/dropped"], metrics["groups/without_spread"]) == (1, 1)
    assert metrics["policy/turns_of_several_versions"] == 0


def test_a_token_of_an_old_version_counts_wherever_in_its_turn_it_is() -> None:
    versions = np.asarray([-1, -1, 1, 3, -1, -1, 3, 3], np.int32)
    spanning = replace(trajectory(Task(0, "a", 5), 0, 1.0), weight_versions=versions)
    group = Group("train-0", spanning.task, (spanning, trajectory(spanning.task, 1, 0.0)))
    metrics = rollout_metrics(replace(collected(), groups=(group,)), version=4)
    assert metrics["policy/staleness_max"] == 3
    assert metrics["policy/turns_of_several_versions"] == 1


def test_a_failed_validation_task_is_no_reward_of_zero() -> None:
    assert validation_metrics(collected())["val/reward"] == 0.5
    nothing = validation_metrics(Collected((), collected().dropped, {}))
    assert nothing == {"val/failed": 1}


def test_train_sequences_carry_their_groups_advantage() -> None:
    sequences = train_sequences(collected().groups, LearnerConfig().resolved())
    assert np.allclose([s.advantages[2] for s in sequences], [-(0.5**0.5), 0.5**0.5, 0, 0], atol=1e-3)
    assert [s.group for s in sequences] == [0, 0, 1, 1]


def test_everything_is_written_and_an_earlier_run_is_kept(config: RunConfig) -> None:
    for expected in (None, "t."):
        files = RunFiles(config)
        assert (files.moved_to is None) == (expected is None)
        files.metrics(1, {"reward/mean": 0.25, "sync/checksum": "abc"})
        files.rollouts(1, collected())
        files.ledger(1, collected())
        files.summary({"steps": 1})
        files.close()
    assert load_config(files.path / "config.yaml") == config
    assert json.loads((files.path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "reward/mean": 0.25,
        "sync/checksum": "abc",
    }
    records = [json.loads(line) for line in (files.path / "trajectories/step_000001.jsonl").read_text().splitlines()]
    assert [record["reward"] for record in records] == [0.0, 1.0, 0.5, 0.5]
    assert records[0]["loss_mask"] == [0, 0, 1, 1] * 2
    ledger = [json.loads(line) for line in (files.path / "ledger.jsonl").read_text().splitlines()]
    assert [(line["task"], line["trained"]) for line in ledger] == [(0, True), (1, True), (2, False)]
    assert ledger[2]["cause"] == "env_error: boom"
    assert SchedulerState.from_json(json.loads((files.path / "scheduler.json").read_text())) == collected().state
    events = EventAccumulator(str(files.path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("reward/mean")] == [0.25]
    assert files.moved_to is not None
    assert (files.moved_to / "metrics.jsonl").is_file()


def test_alarms_of_steps_that_are_made_again_are_kept_aside(config: RunConfig) -> None:
    files = RunFiles(config)
    with checkpoint_store(config).writing(3, {}):
        pass
    for step, name in ((3, "entropy_collapse"), (4, "entropy_collapse"), (1_000_000, "not_finite")):
        files.alarm(step, Alarm(name, "warn", "why"), {}, collected())
    (files.path / "alarms/notes").mkdir()
    files.close()
    checkpoint = Checkpoint(checkpoint_store(config).path_of(3), 3, {})
    files = RunFiles(config, ResumePoint(checkpoint, RolloutState(), {}, validated=False))
    files.close()
    assert {path.name for path in (files.path / "alarms").iterdir()} == {"step_000003_entropy_collapse", "notes"}
    assert files.discarded is not None
    aside = {path.name: path for path in (files.discarded / "alarms").iterdir()}
    assert set(aside) == {"step_000004_entropy_collapse", "step_1000000_not_finite"}
    assert (aside["step_000004_entropy_collapse"] / "trajectories.jsonl").is_file()


def test_a_histogram_and_what_is_not_finite_are_json_and_reach_tensorboard(config: RunConfig) -> None:
    files = RunFiles(config)
    histogram = Histogram.of([-1.0, 0.0, 0.5, 3.0], (-0.5, 0.5))
    files.metrics(1, {"advantage/histogram": histogram, "loss": math.nan, "grad/norm": math.inf, "lr": 0.5})
    files.close()
    row = json.loads((files.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {
        "step": 1,
        "advantage/histogram": {
            "edges": [-0.5, 0.5],
            "counts": [1, 2, 1],
            "low": -1,
            "high": 3,
            "total": 2.5,
            "squares": 10.25,
        },
        "loss": None,
        "grad/norm": None,
        "lr": 0.5,
    }
    events = EventAccumulator(str(files.path / "tensorboard")).Reload()
    shown = events.Histograms("advantage/histogram")[0].histogram_value
    assert (shown.min, shown.max, shown.num, shown.sum, shown.sum_squares) == (-1, 3, 4, 2.5, 10.25)
    assert list(shown.bucket) == [1, 2, 1]
    assert math.isnan(events.Scalars("loss")[0].value)


def test_the_scalars_of_updates_and_syncs() -> None:
    engine = TableEngine()
    update = PolicyUpdate(LearnerConfig(), engine, 1.0, flops=ModelFlops(1.0, 1.0, 1.0))
    stats = update.run(train_sequences(collected().groups, MethodConfig().resolved()))
    learned = learn_metrics(stats)
    assert learned["policy/ratio_max"] == stats["ratio_max"] and learned["grad/norm"] == stats["grad_norm"]
    assert learned["learn/tflops_per_s"] == stats["tflops_per_s"] and "learn/mfu" not in learned
    synced = sync_metrics(Published(3, "sum", 2**31, broadcast_s=0.5, apply_s=1.0, turns_late=2))
    assert synced["sync/gib_per_s"] == 4 and synced["sync/turns_late"] == 2


def test_what_the_learner_computed_is_beside_what_the_engine_did(config: RunConfig) -> None:
    files, played = RunFiles(config), collected()
    trajectories = [t for group in played.groups for t in group.trajectories]
    learned: list[LearnedLogprobs] = [(None, t.loss_mask) for t in trajectories]
    logprobs = np.full(len(trajectories[0].token_ids), -0.25, np.float32)
    first = int(np.flatnonzero(trajectories[0].loss_mask)[0])
    logprobs[first] = np.nan
    learned[0] = (logprobs, trajectories[0].loss_mask)
    files.rollouts(1, played, learned=learned)
    files.rollouts(1, played, kind="validation")
    records = [json.loads(line) for line in (files.path / "trajectories/step_000001.jsonl").read_text().splitlines()]
    told = [-0.25 if trained else None for trained in trajectories[0].loss_mask]
    told[first] = None
    assert records[0]["learner_logprobs"] == told
    assert records[1]["learner_logprobs"] is None
    validation = (files.path / "trajectories/validation_000001.jsonl").read_text().splitlines()
    assert "learner_logprobs" not in json.loads(validation[0])


def test_logprobs_are_written_as_python_rounds_them(config: RunConfig) -> None:
    random = np.random.default_rng(0)
    values = -(random.exponential(2.0, 5000) * 10.0 ** random.integers(-7, 2, 5000)).astype(np.float32)
    values[0], values[1] = 0.0, -np.inf
    one = replace(
        collected().groups[0].trajectories[0],
        **{name: np.zeros(len(values), np.int32) for name in ("token_ids", "weight_versions")},
        loss_mask=np.arange(len(values)) % 3 > 0,
        logprobs=values,
    )
    record = trajectory_record(one, (values, one.loss_mask))
    rounded = [round(value, 6) for value in values.tolist()]
    assert json.dumps(record["logprobs"]) == json.dumps(rounded)
    told = zip(rounded, one.loss_mask, strict=True)
    known = [value if trained and math.isfinite(value) else None for value, trained in told]
    assert json.dumps(record["learner_logprobs"]) == json.dumps(known)
