"""`trajectories.parquet`: a folder of part files, each written whole, so that a kill leaves only readable ones.

Readers of Parquet (pandas, polars, DuckDB, Hugging Face datasets) take the folder as one table.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_A_PART = 1024
_TOKENS_A_PART = 500_000
"""What is not written yet stays in memory, some 100 bytes a token."""
_PART_EVERY_S = 60.0

_TURN = pa.struct(
    [
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
        ("generate_s", pa.float64()),
        ("env_s", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("env", pa.string()),
        ("task", pa.int64()),
        ("seed", pa.int64()),
        ("split", pa.string()),
        ("group_id", pa.string()),
        ("episode", pa.int32()),
        ("attempt", pa.int32()),
        ("status", pa.string()),
        ("failure", pa.string()),
        ("reward", pa.float64()),
        ("drifted", pa.bool_()),
        ("messages", pa.string()),  # JSON: their content has no one type
        ("turns", pa.list_(_TURN)),
        ("sampling", pa.struct([("temperature", pa.float64()), ("max_tokens", pa.int32())])),
        ("metrics", pa.map_(pa.string(), pa.float64())),
        ("reward_components", pa.map_(pa.string(), pa.float64())),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("logprobs", pa.list_(pa.float32())),
        ("weight_versions", pa.list_(pa.int32())),
    ]
)


class ParquetParts:
    """Follows a rollout's `trajectories.jsonl`, of which it always has the first rows (see `rollout_store.Mirror`)."""

    def __init__(self, path: Path) -> None:
        """Open the folder, or make it. If a part cannot be read, nothing of them is kept.

        Args:
            path: of the folder, such as `rollouts/demo/trajectories.parquet`.
        """
        self._path = path
        self._waiting: list[Mapping[str, Any]] = []
        self._waiting_tokens = 0
        self._written = time.monotonic()
        self.rows = 0
        self._parts = 0
        path.mkdir(exist_ok=True)
        try:
            while self._part(self._parts).exists():
                self.rows += pq.read_metadata(self._part(self._parts)).num_rows
                self._parts += 1
        except pa.ArrowInvalid:
            self.clear()

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The next trajectories' records (see `trajectory_record`)."""
        for record in records:
            self._waiting.append(record)
            self._waiting_tokens += len(record["token_ids"])
            if len(self._waiting) >= _ROWS_A_PART or self._waiting_tokens >= _TOKENS_A_PART:
                self.flush()
        if time.monotonic() - self._written > _PART_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one more part."""
        self._written = time.monotonic()
        if not self._waiting:
            return
        table = pa.Table.from_pylist([_row(record) for record in self._waiting], schema=SCHEMA)
        # Readers of the folder pass over names that begin with a dot.
        new = self._path / ".new"
        pq.write_table(table, new, compression="zstd")
        new.replace(self._part(self._parts))
        self._parts += 1
        self.rows += len(self._waiting)
        self._waiting = []
        self._waiting_tokens = 0

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self._path)
        self._path.mkdir()
        self.rows = self._parts = self._waiting_tokens = 0
        self._waiting = []

    def _part(self, number: int) -> Path:
        return self._path / f"part-{number:06d}.parquet"


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    texts = {"messages": json.dumps(record["messages"], ensure_ascii=False)}
    # Records of an earlier version have no components.
    maps = {name: list(record.get(name, {}).items()) for name in ("metrics", "reward_components")}
    return {**record, **texts, **maps, "loss_mask": [bool(trained) for trained in record["loss_mask"]]}
