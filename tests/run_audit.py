"""What must be true of a run's directory, whatever happened to the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, whose last line is whole."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n"), f"{path} ends in half a line"
    return [json.loads(line) for line in data.splitlines()]


def audit(run: Path, steps: int, groups: int = 4, group_size: int = 4) -> None:
    """0 tasks skipped, 0 twice, 0 failures scored: in the ledger, in the metrics and in the trajectories."""
    ledger = lines_of(run / "ledger.jsonl")
    assert sorted(line["task"] for line in ledger) == list(range(len(ledger)))
    assert all(line.get("cause") for line in ledger if not line["trained"]), "what is dropped has its cause"
    trained = [line for line in ledger if line["trained"]]
    assert len(trained) == groups * steps
    assert [row["step"] for row in lines_of(run / "metrics.jsonl")] == list(range(steps + 1))
    for step in range(1, steps + 1):
        played = lines_of(run / f"trajectories/step_{step:06d}.jsonl")
        tasks = [line["task"] for line in played]
        assert sorted(set(tasks)) == sorted(line["task"] for line in trained if line["step"] == step)
        assert len(tasks) == groups * group_size
        assert all(line["failure"] is None and line["status"] != "failed" for line in played)
