"""A start on a machine that has not the run's newest checkpoint: it is taken from the mirror first."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from raygym.checkpoint import CheckpointStore
from raygym.config import ConfigError, RunConfig
from raygym.file_manifest import DamagedFolderError, check_files, read_manifest
from raygym.mirror_store import MirrorStore, Upload
from raygym.mirror_upload import begins_there, run_in_mirror, write_identity
from raygym.resume import checkpoint_store
from raygym.run_files import move_aside
from raygym.watched_call import watched

_FRESH = "--fresh to begin anew"
_IDLE_S = 180.0


def restore_newer(
    config: RunConfig, store: MirrorStore, told: Callable[[str], None], *, idle_s: float = _IDLE_S
) -> None:
    """Where the mirror has a newer whole checkpoint than the run's folder, put it and the run's files there.

    What was in the folder is moved aside. After it, `resume_point` finds the run as it was when that checkpoint was
    made. A kill in the middle leaves the folder as it was; one between its two renames leaves none, and the next call
    makes the second one.

    Args:
        config: the run's; `checkpoint.mirror` is set.
        store: the mirror.
        told: gets lines for a person.
        idle_s: a store of which nothing has come for so many seconds cannot be read.

    Raises:
        ConfigError: the mirror cannot be read and the folder has no checkpoint, or the mirror holds another run.
    """
    url, run_dir = str(config.checkpoint.mirror), config.run_dir
    making = _making(run_dir)
    if not run_dir.exists() and run_in_mirror(making, url) is not None:  # that is written last
        making.rename(run_dir)
    if begins_there(run_dir, url):
        told(f"{run_dir} goes on; {url} does not know of this run yet, and earlier ones of its name are left there")
        return
    local = checkpoint_store(config).newest_whole(lambda _: None)
    step = local.step if local is not None else -1
    try:
        runs = watched(store.runs, idle_s)
        if not runs:
            return
        current, mine = runs[-1], run_in_mirror(run_dir, url)
        if mine != current and (mine is not None or local is not None):
            raise ConfigError(
                f"checkpoint.mirror: {url} holds another run of the name {config.name} ({current}) than {run_dir}; "
                f"give this run another name or mirror, move {run_dir} away to go on with that one, or use {_FRESH}"
            )
        uploads = watched(partial(store.uploads, current), idle_s)
        newer = [upload for upload in reversed(uploads) if upload.step > step]
        for upload in newer:
            try:
                _restore(config, store, current, upload, told, idle_s)
                return
            except DamagedFolderError as error:
                told(f"the mirror's {upload.folder} is skipped: {error}")
    except ConfigError:
        raise
    except Exception as error:  # of any type: each kind of store has its own
        said = f"checkpoint.mirror: {url} cannot be read ({type(error).__name__}: {error})"
        if local is None:
            raise ConfigError(
                f"{said}, and {run_dir} has no checkpoint to go on from; mend it, or use {_FRESH}"
            ) from error
        told(f"warning: {said}; the run goes on from {local.path}")
        return
    if local is None and newer:
        raise ConfigError(f"checkpoint.mirror: none of the checkpoints in {url} can be used; use {_FRESH}")


def _restore(
    config: RunConfig, store: MirrorStore, run: str, upload: Upload, told: Callable[[str], None], idle_s: float
) -> None:
    run_dir = config.run_dir
    making = _making(run_dir)

    def get(part: str, local: Path) -> None:
        watched(lambda: store.get(run, upload, part, local), idle_s, lambda: _bytes_below(local))

    told(f"taking checkpoint step_{upload.step:06d} from {config.checkpoint.mirror}")
    get("run", making)
    _check(making)
    (making / "manifest.json").unlink()
    get("checkpoint", CheckpointStore(making / "checkpoints").path_of(upload.step))
    _check(CheckpointStore(making / "checkpoints").path_of(upload.step))
    write_identity(making, str(config.checkpoint.mirror), run)
    if (moved := move_aside(run_dir)) is not None:
        told(f"what was in {run_dir} is older and was moved to {moved}")
    making.rename(run_dir)


def _making(run_dir: Path) -> Path:
    return run_dir.parent / f".{run_dir.name}.restoring"


def _bytes_below(folder: Path) -> int:
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += (Path(path) / name).stat().st_size
    return size


def _check(folder: Path) -> None:
    check_files(folder, read_manifest(folder))
