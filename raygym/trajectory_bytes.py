"""A trajectory as one string of bytes, quickly: hundreds a second go from runner to manager to learner.

Its arrays are written as they lie in memory and read back as views of the bytes; the rest is pickled as plain values.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any

import numpy as np

from raygym.types import EpisodeStatus, FailureKind, Sampling, Task, Trajectory, Turn

_HEADER = struct.Struct("<Q")
# By falling size of an item, so that each array begins where its items may lie.
_ARRAYS: dict[str, Any] = {
    "token_ids": np.int32,
    "logprobs": np.float32,
    "weight_versions": np.int32,
    "loss_mask": np.bool_,
}
_PARTS: dict[str, Any] = {"task": Task, "sampling": Sampling}
_PLAIN = [
    field.name
    for field in fields(Trajectory)
    if field.init and field.name not in {*_ARRAYS, *_PARTS, "turns", "status", "failure"}
]


def _values_of(cls: Any) -> Callable[[Any], tuple[Any, ...]]:
    values: Callable[[Any], tuple[Any, ...]] = attrgetter(*(field.name for field in fields(cls)))
    return values


_plain: Callable[[Any], tuple[Any, ...]] = attrgetter(*_PLAIN)
_turn = _values_of(Turn)
_parts = {name: _values_of(part) for name, part in _PARTS.items()}


def pack(trajectory: Trajectory) -> bytes:
    """T tokens in 13 T bytes, and what is beside them. Of one that came as bytes, those bytes."""
    if trajectory.packed is not None:
        return trajectory.packed
    rest = (
        _plain(trajectory),
        [values(getattr(trajectory, name)) for name, values in _parts.items()],
        [_turn(turn) for turn in trajectory.turns],
        trajectory.status.value,
        None if trajectory.failure is None else trajectory.failure.value,
    )
    arrays = [np.asarray(getattr(trajectory, name), dtype).tobytes() for name, dtype in _ARRAYS.items()]
    return b"".join([_HEADER.pack(len(trajectory.token_ids)), *arrays, pickle.dumps(rest, protocol=5)])


def unpack(packed: bytes) -> Trajectory:
    """What was packed; its arrays cannot be written to."""
    (length,), at = _HEADER.unpack_from(packed), _HEADER.size
    values: dict[str, Any] = {}
    for name, dtype in _ARRAYS.items():
        array = values[name] = np.frombuffer(packed, dtype, length, at)
        at += array.nbytes
    plain, parts, turns, status, failure = pickle.loads(memoryview(packed)[at:])
    values |= zip(_PLAIN, plain, strict=True)
    values |= {name: part(*given) for (name, part), given in zip(_PARTS.items(), parts, strict=True)}
    values["turns"] = tuple(Turn(*turn) for turn in turns)
    values["status"], values["failure"] = EpisodeStatus(status), failure and FailureKind(failure)
    trajectory = Trajectory(**values)
    object.__setattr__(trajectory, "packed", packed)
    return trajectory
