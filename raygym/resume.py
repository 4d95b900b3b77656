"""Whether `raygym train` goes on with a run that is there already, and from where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raygym.checkpoint import Checkpoint, CheckpointStore
from raygym.config import ConfigError, RunConfig
from raygym.config_change import changes
from raygym.rollout_state import RolloutState
from raygym.run_row import Row, json_row, parsed_row

_RUN = "run.json"
_FRESH = "--fresh to move the run aside and begin anew"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a run goes on from."""

    checkpoint: Checkpoint
    rollouts: RolloutState
    row: Row
    """What was known of the checkpoint's step when it was made: its line in metrics.jsonl, perhaps not written yet."""
    validated: bool
    """Whether that line waits for a validation."""

    @property
    def step(self) -> int:
        """Steps that were made; the weight version as well."""
        return self.checkpoint.step


class FinishedError(Exception):
    """All steps of the run were made. The text says so."""


def save_run_state(folder: Path, rollouts: RolloutState, row: Row, validated: bool) -> None:
    """Write what the driver knows into a checkpoint's `training_state/`; the arguments are those of `ResumePoint`."""
    folder.mkdir(exist_ok=True)
    rollouts.save(folder)
    (folder / _RUN).write_text(json.dumps({"row": json_row(row), "validated": validated}) + "\n", encoding="utf-8")


def require_shared(folder: Path, names: Sequence[str]) -> None:
    """Refuse a checkpoint whose files learner 0 wrote to a folder of the same name on another machine.

    Raises:
        RuntimeError: one of `names` is not in `folder`.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise RuntimeError(
            f"{folder / missing[0]} is not there, although learner 0 wrote it: its machine does not share runs_dir "
            "with the driver's; expected a shared folder, such as on NFS"
        )


def resume_point(config: RunConfig, *, allow_change: bool, told: Callable[[str], None]) -> ResumePoint | None:
    """Where the run of this name goes on; None where it has no checkpoint to go on from.

    Args:
        config: of the run as it is wanted now.
        allow_change: go on also with another config, which gives a result that neither config gives alone.
        told: gets lines for a person: checkpoints that are skipped, keys that have changed.

    Raises:
        ConfigError: the config has changed, and that is not allowed.
        FinishedError: there is nothing left to do.
    """
    store = checkpoint_store(config)
    store.clean()
    checkpoint = store.newest_whole(told)
    if checkpoint is None:
        return None
    found = changes(checkpoint.config, config.model_dump(mode="json"))
    refused = [] if allow_change else [change for change in found if not change.harmless]
    if refused:
        listed = "; ".join(str(change) for change in refused)
        raise ConfigError(
            f"{config.run_dir} was begun with another config and would not give the result of either: {listed} "
            "(key: old -> new); go on with the old values, or use --allow-config-change to go on with the new ones, "
            f"or {_FRESH}"
        )
    for change in found:
        told(f"changed: {change}")
    if checkpoint.step > config.steps or _finished_steps(config.run_dir) >= config.steps:
        raise FinishedError(
            f"{config.run_dir} has made its {config.steps} steps; raise steps to go on, or use {_FRESH}"
        )
    rollouts = RolloutState.load(checkpoint.state)
    rollouts = rollouts.resumed(
        checkpoint.step, checkpoint.config["rollout"]["groups_per_step"], config.rollout.groups_per_step
    )
    run = json.loads((checkpoint.state / _RUN).read_text(encoding="utf-8"))
    return ResumePoint(checkpoint, rollouts, parsed_row(run["row"]), run["validated"])


def checkpoint_store(config: RunConfig) -> CheckpointStore:
    """The run's checkpoints."""
    return CheckpointStore(config.run_dir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best)


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Nobody else trains a run of this name meanwhile, on any machine that shares the folder.

    Raises:
        ConfigError: somebody does.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which may be moved aside. The system releases it when the process ends, however it ends.
    lock = FileLock(run_dir.parent / f".{run_dir.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"name: {run_dir} is being trained by another process; wait for it, stop it, or give this run another name"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _finished_steps(run_dir: Path) -> int:
    """What summary.json says; -1 where the run has not come to its end."""
    try:
        summary: Any = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return int(summary["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1
