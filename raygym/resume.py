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
from raygym.file_manifest import DamagedFolderError
from raygym.rollout_state import RolloutState
from raygym.run_row import Row, json_row, parsed_row

_RUN = "run.json"
_FRESH = "--fresh to move the run aside and begin anew"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a run goes on from."""

    checkpoint: Checkpoint | None
    """None: the starting policy, before the first step."""
    rollouts: RolloutState
    row: Row
    """What was known of the checkpoint's step when it was made: its line in metrics.jsonl, perhaps not written yet."""
    validated: bool
    """Whether that line waits for a validation."""

    @property
    def step(self) -> int:
        """Steps that were made; the weight version as well."""
        return self.checkpoint.step if self.checkpoint is not None else 0


class FinishedError(Exception):
    """All steps of the run were made. The text says so."""

    def __init__(self, text: str, newest: int) -> None:
        """`newest` is the step of its newest whole checkpoint."""
        super().__init__(text)
        self.newest = newest


def save_run_state(folder: Path, rollouts: RolloutState, row: Row, validated: bool) -> None:
    """Write what the driver knows into a checkpoint's `training_state/`; the arguments are those of `ResumePoint`."""
    folder.mkdir(exist_ok=True)
    rollouts.save(folder)
    (folder / _RUN).write_text(json.dumps({"row": json_row(row), "validated": validated}) + "\n", encoding="utf-8")


def _load_run_state(folder: Path) -> tuple[Row, bool]:
    """Row and `validated` that `save_run_state` wrote."""
    try:
        run = json.loads((folder / _RUN).read_text(encoding="utf-8"))
        return parsed_row(run["row"]), bool(run["validated"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{folder / _RUN} does not hold a step as raygym writes it ({type(error).__name__}: {error})"
        raise DamagedFolderError(problem) from error


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
        ConfigError: it has checkpoints, and none can be used; or the config has changed, and that is not allowed.
        FinishedError: there is nothing left to do.
    """
    store = checkpoint_store(config)
    store.clean()
    checkpoint = store.newest_whole(told)
    if checkpoint is None:
        if store.steps():  # it was not told to begin anew, and its checkpoints may only be out of reach for now
            raise ConfigError(
                f"{config.run_dir}: none of its checkpoints can be used (why was told of each); restore one, or use "
                f"{_FRESH}"
            )
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
    if checkpoint.step > config.steps or _is_finished(config, checkpoint):
        raise FinishedError(
            f"{config.run_dir} has made its {config.steps} steps; raise steps to go on, or use {_FRESH}",
            checkpoint.step,
        )
    try:
        rollouts = RolloutState.load(checkpoint.state)
        row, validated = _load_run_state(checkpoint.state)
    except DamagedFolderError as error:  # its checksums are right, so it was written like that
        raise ConfigError(f"{error}; restore {checkpoint.path}, or use {_FRESH}") from error
    rollouts = rollouts.resumed(checkpoint.step, config.rollout.groups_per_step, config.rollout.order)
    return ResumePoint(checkpoint, rollouts, row, validated)


def rewind_point(config: RunConfig, told: Callable[[str], None]) -> ResumePoint:
    """Where a run goes on that its own process has stopped: at its newest whole checkpoint, or else at its beginning.

    Raises ConfigError as `resume_point` does. `told` is as there.
    """
    # That the config has changed since that checkpoint was allowed when this process began.
    found = resume_point(config, allow_change=True, told=told)
    return found or ResumePoint(None, RolloutState(), {}, validated=config.validation.tasks > 0)


def checkpoint_store(config: RunConfig) -> CheckpointStore:
    """The run's checkpoints."""
    return CheckpointStore(config.run_dir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_best)


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Nobody else trains a run of this name meanwhile, on any machine that shares the folder.

    Raises:
        ConfigError: somebody does, or nothing can be written there.
    """
    # Beside the folder, which may be moved aside. The system releases it when the process ends, however it ends.
    lock = FileLock(run_dir.parent / f".{run_dir.name}.lock")
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"name: {run_dir} is being trained by another process; wait for it, stop it, or give this run another name"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"runs_dir: {run_dir.parent} cannot be written to ({error.strerror or error}); expected a folder, or the "
            "name of one to make, in which this user may make files"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _is_finished(config: RunConfig, newest: Checkpoint) -> bool:
    """Whether the run came to its end, as summary.json says, and what it left there is whole."""
    try:
        summary: Any = json.loads((config.run_dir / "summary.json").read_text(encoding="utf-8"))
        made, saved = int(summary["steps"]), "checkpoint" in summary
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # Where its last step was saved and that is damaged by now, the last steps are made again.
    return made >= config.steps and (newest.step >= config.steps or not saved)
