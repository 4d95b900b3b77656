"""`raygym rollout` as a user runs it: killed half-way, interrupted, and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiers import only_long

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def start(out: Path, *changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raygym", "rollout", "configs/tiny.yaml", "policy.engine=simulated",
               "policy.simulated.error_rate=0.05", "policy.simulated.turn_latency_s=0.2", "rollout.max_concurrent=8",
               "--tasks=40", "--samples=3", "--temperature=1", f"--out={out}", *changes]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def written(out: Path) -> list[dict[str, Any]]:
    path = out / "trajectories.jsonl"
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def once_written(out: Path, records: int, process: subprocess.Popen[str], send: signal.Signals) -> tuple[str, str]:
    """Send a signal as soon as so many trajectories are there; what the command printed."""
    deadline = time.monotonic() + 120
    while len(written(out)) < records and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(send)
    return process.communicate(timeout=120)


@only_long  # three starts, each a quarter of a minute
def test_killed_then_interrupted_then_finished_has_every_task_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(out) as killed:
        once_written(out, 9, killed, signal.SIGKILL)
    before = written(out)
    assert 9 <= len(before) < 120
    with start(out) as interrupted:
        printed, error = once_written(out, len(before) + 9, interrupted, signal.SIGINT)
    assert interrupted.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted" in error
    assert "tasks are there already" in printed
    between = written(out)
    assert len(between) % 3 == 0, "an interrupt leaves whole groups only"
    assert between[: len(before) // 3 * 3] == before[: len(before) // 3 * 3], "what was there stays"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["missing_tasks"] == 40 - len(between) // 3 - summary["dropped_tasks"] > 0

    with start(out, "--tasks=41") as changed:
        _, error = changed.communicate(timeout=120)
    assert changed.returncode == 2
    assert "--tasks (was 40, is 41)" in error

    with start(out) as finished:
        printed, error = finished.communicate(timeout=200)
    assert finished.returncode == 0, error
    played = [(record["task"], record["episode"]) for record in written(out)]
    dropped = out / "dropped.jsonl"
    given_up = [json.loads(line)["task"] for line in dropped.read_text().splitlines()] if dropped.exists() else []
    assert sorted(played) == [(task, e) for task in range(40) if task not in given_up for e in range(3)]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["missing_tasks"], summary["episodes"]) == (0, len(played))
    assert summary["failures"].get("engine_error", 0) > 0
    assert set(summary["pass_at"]) == {"1", "2", "3"}
    assert f"{len(played)} episodes" in printed


@only_long  # Serve takes a quarter of a minute to replace a replica
def test_a_dead_engine_is_replaced_and_costs_no_task(tmp_path: Path) -> None:
    changes = ["policy.replicas=2", "policy.simulated.die_after_turns=40", "policy.simulated.error_rate=0"]
    with start(tmp_path / "out", *changes) as rollout:
        _, error = rollout.communicate(timeout=200)
    assert rollout.returncode == 0, error
    played = [(record["task"], record["episode"]) for record in written(tmp_path / "out")]
    assert sorted(played) == [(task, e) for task in range(40) for e in range(3)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dropped_tasks"] == 0
    assert set(summary["failures"]) <= {"engine_lost", "engine_error"} and summary["failures"]
