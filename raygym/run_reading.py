"""What a run or a rollout has left in its folder, for programs: rows of metrics, trajectories, its end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from raygym.errors import RaygymError
from raygym.types import EpisodeStatus, FailureKind, Sampling, Task, Trajectory, Turn


class UnreadableRun(RaygymError, ValueError):
    """A folder or a file in it is not what a run leaves. The text says which, and what is wrong with it."""


def is_own(path: Path, run: Path) -> bool:
    """Whether it is a file of the folder `run`.

    A link in a run that came from elsewhere must not show what is outside of it; a pipe would be waited for.
    """
    return path.is_file() and path.resolve().is_relative_to(run.resolve())


def check_own(path: Path, run: Path) -> None:
    """Let pass what is a file of the folder `run`, and what is not there.

    Raises:
        UnreadableRun: it is something else.
    """
    if os.path.lexists(path) and not is_own(path, run):
        raise UnreadableRun(f"{path}: expected a file in {run}, found a link out of it or no file; it is not read")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a row is a number that is finite as a float."""
    # NaN compares as false; a whole number is compared exactly, however long it is.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def json_lines(
    path: Path, damaged: Callable[[str], None] | None = None, *, within: Path | None = None, skipped: int = 0
) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, one at a time; none where there is no file.

    A last line without its end is still being written, or was when its writer was killed, and is left out.

    Args:
        path: the file.
        damaged: is told of each line that is no JSON object, which is then left out.
        within: the folder that the file must be in, also where it is a link; None where that does not matter.
        skipped: bytes at its beginning that are not read, nor is the rest of a line that begins in them.

    Raises:
        UnreadableRun: there is such a line, or the file is outside, and nobody to tell.
    """
    if within is not None:
        try:
            check_own(path, within)
        except UnreadableRun as error:
            if damaged is None:
                raise
            damaged(str(error))
            return
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UnreadableRun(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        if skipped:
            file.seek(skipped - 1)
            file.readline()
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield record
                continue
            which = "a line" if skipped else f"line {number}"
            problem = f"{path}: {which} is no JSON object; the file was damaged or changed"
            if damaged is None:
                raise UnreadableRun(problem)
            damaged(problem)


def json_file(path: Path, *, within: Path | None = None) -> dict[str, Any]:
    """A file that holds one JSON object; {} where there is none. `within`: see `json_lines`.

    Raises:
        UnreadableRun: it holds something else, or is outside.
    """
    if within is not None:
        check_own(path, within)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableRun(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UnreadableRun(f"{path}: expected a JSON object, found a {type(found).__name__}")
    return found


def trajectory_files(run: Path, kind: str) -> list[tuple[int, Path]]:
    """A run's files of trajectories, each with its step, in order. `kind`: `step` or `validation`."""
    found = [(path.stem.rpartition("_"), path) for path in (run / "trajectories").glob(f"{kind}_*.jsonl")]
    return sorted((int(number), path) for (of, _, number), path in found if of == kind and number.isdigit())


def parsed_trajectory(record: Mapping[str, Any]) -> Trajectory:
    """The trajectory of which `raygym.run_files.trajectory_record` made this record, but for a failure's details.

    Raises:
        UnreadableRun: a key is missing, or its value is of the wrong kind.
    """
    try:
        return Trajectory(
            task=Task(record["task"], record["env"], record["seed"], record["split"]),
            group_id=record["group_id"],
            episode=record["episode"],
            attempt=record["attempt"],
            status=EpisodeStatus(record["status"]),
            token_ids=np.asarray(record["token_ids"], np.int32),
            loss_mask=np.asarray(record["loss_mask"], np.bool_),
            logprobs=np.asarray(record["logprobs"], np.float32),
            weight_versions=np.asarray(record["weight_versions"], np.int32),
            turns=tuple(Turn(**turn) for turn in record["turns"]),
            reward=record["reward"],
            messages=tuple(record["messages"]),
            sampling=Sampling(**record["sampling"]),
            drifted=record["drifted"],
            failure=FailureKind(record["failure"]) if record["failure"] else None,
            metrics=record["metrics"],
            reward_components=record["reward_components"],
        )
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UnreadableRun(f"a record is no trajectory as raygym writes it ({problem})") from error
