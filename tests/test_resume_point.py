"""Where a run goes on, by what is left of its checkpoints; without anybody who goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raygym.config import ConfigError, RunConfig
from raygym.config_file import parse_config
from raygym.resume import FinishedError, checkpoint_store, resume_point, save_run_state
from raygym.rollout_state import RolloutState


def config_of(tmp_path: Path, **changes: Any) -> RunConfig:
    data = {
        "name": "t",
        "steps": 4,
        "runs_dir": str(tmp_path),
        "policy": {"model": "tiny"},
        "envs": [{"id": "a"}],
        "checkpoint": {"every": 2, "keep_last": 9},
    }
    return parse_config(data | changes)


def save(config: RunConfig, *steps: int) -> None:
    for step in steps:
        with checkpoint_store(config).writing(step, config.model_dump(mode="json")) as folder:
            save_run_state(folder / "training_state", RolloutState(), {}, validated=False)


def finish(config: RunConfig) -> None:
    """As `Trainer` tells the end: the checkpoint is named where the last step has one."""
    summary: dict[str, Any] = {"steps": config.steps}
    if config.steps in checkpoint_store(config).steps():
        summary["checkpoint"] = str(checkpoint_store(config).path_of(config.steps))
    (config.run_dir / "summary.json").write_text(json.dumps(summary))


def damage(config: RunConfig, step: int) -> None:
    (checkpoint_store(config).path_of(step) / "training_state/run.json").write_text("")


def resumed_at(config: RunConfig) -> tuple[int | None, list[str]]:
    told: list[str] = []
    found = resume_point(config, allow_change=False, told=told.append)
    return (found.step if found else None), told


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_unasked(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert resumed_at(config) == (None, [])
    save(config, 2, 4)
    damage(config, 2)
    damage(config, 4)
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"t: none of its checkpoints can be used .*--fresh to move the run aside"):
        resume_point(config, allow_change=False, told=told.append)
    assert [line.split(":")[0] for line in told] == [f"checkpoint step_{step:06d} is skipped" for step in (4, 2)]


@pytest.mark.parametrize("checkpoint", [{"every": 2}, {"every": 3}, {"every": 2, "save_final": False}])
def test_the_last_steps_are_made_again_where_their_checkpoint_is_damaged(
    tmp_path: Path, checkpoint: dict[str, Any]
) -> None:
    config = config_of(tmp_path, checkpoint=checkpoint | {"keep_last": 9})
    save(config, 3, 4)
    finish(config)
    with pytest.raises(FinishedError, match="t has made its 4 steps"):
        resumed_at(config)
    damage(config, 4)
    step, (line,) = resumed_at(config)
    assert step == 3 and line.startswith("checkpoint step_000004 is skipped")


def test_a_run_that_saved_nothing_at_its_end_is_finished_all_the_same(tmp_path: Path) -> None:
    config = config_of(tmp_path, checkpoint={"every": 3, "save_final": False})
    save(config, 3)
    finish(config)
    with pytest.raises(FinishedError, match="t has made its 4 steps"):
        resumed_at(config)
    assert resumed_at(config_of(tmp_path, steps=5, checkpoint={"every": 3, "save_final": False}))[0] == 3


def test_more_steps_change_a_rate_that_falls_until_the_last(tmp_path: Path) -> None:
    learner = {"lr_schedule": "linear"}
    save(config_of(tmp_path, learner=learner), 2)
    with pytest.raises(ConfigError, match=r"would not give the result of either: steps: 4 -> 8 \(key: old -> new\)"):
        resumed_at(config_of(tmp_path, learner=learner, steps=8))
