"""Reads the file of a W&B run: LevelDB's log format, a record of protobuf each."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_FILE_HEADER = 7
_FULL, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Its records, in order."""
    data, at, parts = path.read_bytes(), _FILE_HEADER, b""
    while at < len(data):
        if _BLOCK - at % _BLOCK < 7:  # no header fits: the rest of a block is padding
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """What `run.log` was given, row by row."""
    rows = (record.history for record in records(path) if record.WhichOneof("record_type") == "history")
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]
