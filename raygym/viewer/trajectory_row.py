"""What the table shows of a trajectory, taken from its line without reading all of it.

Nearly all of a line is token IDs, logprobs and text. `trajectory_record` writes its keys in one order, so the rest can
be cut out: quotes inside JSON strings are escaped, so `, "token_ids": [` begins a key wherever it stands. Lines of
another layout are parsed whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from sys import intern
from typing import Any

_MESSAGES, _TURNS, _IDS = b', "messages": [', b', "turns": [', b', "token_ids": ['
_ARRAY = {name: f', "{name}": ['.encode() for name in ("token_ids", "loss_mask", "weight_versions")}
_OF_NUMBERS = b"0123456789, -"


@dataclass(slots=True)
class TrajectoryRow:
    """One row of the table: a trajectory, or a task that was dropped and has none."""

    file: str
    """Its file's name within the run, without the suffix; together with `number` it names the trajectory."""
    number: int
    """Of the line, from 0."""
    kind: str
    """`step`, `validation`, `alarm` or `rollout`: what its file is; of a dropped task `dropped`."""
    step: int | None
    env: str
    task: int
    seed: int | None
    group_id: str
    episode: int | None
    attempt: int
    status: str
    failure: str | None
    reward: float | None
    drifted: bool
    turns: int
    tokens: int
    """All of them."""
    generated: int
    """Those in the loss mask."""
    version_min: int | None
    version_max: int | None
    generate_s: float
    env_s: float
    cause: str = ""
    """Of a dropped task: why."""
    offset: int = -1
    """Of the line in its file; -1 of a dropped task."""
    length: int = 0
    generation: int = -1
    """Of its file, see `GrowingLines`: what is at `offset` may be another trajectory later."""

    def shown(self) -> dict[str, Any]:
        """As JSON, without what only the reader of files needs."""
        return {name: getattr(self, name) for name in _SHOWN}


_SHOWN = [name for name in TrajectoryRow.__slots__ if name not in ("offset", "length", "generation")]


def trajectory_row(
    line: bytes, *, file: str, number: int, kind: str, step: int | None, offset: int, generation: int = -1
) -> TrajectoryRow:
    """The row of one line.

    Raises:
        ValueError, ArithmeticError, RecursionError: it is no trajectory.
    """
    head, turns, counts = _cut_out(line) or _parsed(line)
    try:
        return TrajectoryRow(
            file,
            number,
            kind,
            step,
            env=intern(str(head["env"])),
            task=int(head["task"]),
            seed=_whole(head.get("seed")),
            group_id=intern(str(head["group_id"])),
            episode=int(head["episode"]),
            attempt=int(head.get("attempt", 0)),
            status=intern(str(head["status"])),
            failure=None if head.get("failure") is None else intern(str(head["failure"])),
            reward=_finite(head["reward"]),
            drifted=bool(head.get("drifted", False)),
            turns=len(turns),
            tokens=counts[0],
            generated=counts[1],
            version_min=counts[2],
            version_max=counts[3],
            generate_s=_finite(sum(float(turn.get("generate_s", 0)) for turn in turns)) or 0.0,
            env_s=_finite(sum(float(turn.get("env_s", 0)) for turn in turns)) or 0.0,
            offset=offset,
            length=len(line),
            generation=generation,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no trajectory: {error}") from error


def dropped_row(record: dict[str, Any], number: int, file: str) -> TrajectoryRow:
    """The row of a task that was given up: a line of ledger.jsonl or dropped.jsonl.

    Raises:
        ValueError, ArithmeticError: it is none.
    """
    try:
        cause = str(record["cause"])
        return TrajectoryRow(
            file,
            number,
            "dropped",
            _whole(record.get("step")),
            env=intern(str(record["env"])),
            task=int(record["task"]),
            seed=_whole(record.get("seed")),
            group_id=str(record["group_id"]),
            episode=None,
            attempt=0,
            status="dropped",
            failure=intern(cause.partition(":")[0]),
            reward=None,
            drifted=False,
            turns=0,
            tokens=0,
            generated=0,
            version_min=None,
            version_max=None,
            generate_s=0.0,
            env_s=0.0,
            cause=cause,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"no dropped task: {error}") from error


_Parts = tuple[dict[str, Any], list[dict[str, Any]], tuple[int, int, int | None, int | None]]


def _cut_out(line: bytes) -> _Parts | None:
    # What stands before the messages are plain values; what stands after the turns are numbers.
    messages, turns, ids = line.find(_MESSAGES), line.rfind(_TURNS), line.rfind(_IDS)
    if not 0 < messages < turns < ids:
        return None
    arrays = [_array(line, name, ids) for name in _ARRAY]
    if None in arrays:
        return None
    token_ids, mask, versions = (array or b"" for array in arrays)
    try:
        head = json.loads(line[:messages] + b"}")
        found, _ = json.JSONDecoder().raw_decode(line[turns + len(_TURNS) - 1 : ids].decode())
    except ValueError:
        return None
    made = [int(version) for version in set(versions.split(b", ")) if version and version[:1] != b"-"]
    tokens = token_ids.count(b",") + 1 if token_ids else 0
    return head, found, (tokens, mask.count(b"1"), min(made, default=None), max(made, default=None))


def _array(line: bytes, name: str, start: int) -> bytes | None:
    """What is between the brackets of an array of whole numbers; None where that is not so."""
    key = _ARRAY[name]
    begin = line.find(key, start)
    end = line.find(b"]", begin)
    if begin < 0 or end < 0:
        return None
    inside = line[begin + len(key) : end]
    return inside if not inside.translate(None, _OF_NUMBERS) else None


def _parsed(line: bytes) -> _Parts:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    try:
        versions = [version for version in record["weight_versions"] if version >= 0]
        counts = (len(record["token_ids"]), sum(map(bool, record["loss_mask"])))
        return record, record["turns"], (*counts, min(versions, default=None), max(versions, default=None))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no trajectory: {error}") from error


def _whole(value: Any) -> int | None:
    """Rows are ordered by it, and it gets into the page's JSON."""
    return None if value is None else int(value)


def _finite(value: Any) -> float | None:
    # Python's JSON has NaN; a browser's has not.
    return float(value) if value is not None and abs(float(value)) < float("inf") else None
