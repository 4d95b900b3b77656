"""What a run holds does not grow: over steps with syncs and checkpoints, and over sessions in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from started_run import RAY, StartedRun, started_run, step_was_made
from test_train_command import ROOT, environment
from tiers import LONG, only_long

from raygym.cluster_guard import sessions_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
KINDS = ("LearnerActor", "PolicyServer", "EnvRunner", "RolloutManager", "raygym train")
STEPS = 1000 if LONG else 30
# Pools of threads and connections fill up in the first steps.
WARM = 20 if LONG else 10
# A row, its trajectories and its metrics leave something in allocators; a kept version of tiny's weights is 2 MiB.
KIB_PER_STEP = 256


def footprint(run: StartedRun) -> dict[str, tuple[int, int, float]]:
    """By process: open files, threads, KiB of memory."""
    found: dict[str, tuple[int, int, float]] = {}
    for process in run.members():
        with suppress(psutil.NoSuchProcess):  # a short-lived one has ended since; one of these kinds would be missed
            name = " ".join(process.cmdline())
            for kind in KINDS:
                if kind in name:
                    found[f"{kind} {process.pid}"] = (
                        process.num_fds(), process.num_threads(), process.memory_info().rss / 1024,
                    )  # fmt: skip
    return found


def test_steps_with_syncs_and_checkpoints_leave_nothing_behind(tmp_path: Path) -> None:
    with started_run(tmp_path, "checkpoint.every=5", "policy.replicas=2", "rollout.env_runners=2") as run:
        run.wait_for(step_was_made(WARM))
        before = footprint(run)
        run.wait_for(step_was_made(WARM + STEPS), timeout_s=1500)
        after = footprint(run)
        assert before.keys() == after.keys(), "a process was replaced"
        assert len(before) == 7
        for name, (fds, threads, kib) in before.items():
            assert after[name][0] <= fds + 4, f"open files of {name}"
            assert after[name][1] <= threads + 4, f"threads of {name}"
            assert after[name][2] <= kib + KIB_PER_STEP * STEPS + 8192, f"memory of {name}"


# One after the other in one process, which tells of itself after each.
SESSIONS = """
import json, sys, threading
import psutil
from raygym.actors.runs import prepared
from raygym.actors.session import Session
from raygym.config_file import load_config
from raygym.models import resolve_policy

config = load_config(sys.argv[1], ["policy.engine=simulated", "learner.threads=1", "runs_dir=" + sys.argv[2]])
model = str(resolve_policy(config.policy.model))
for _ in range(int(sys.argv[3])):
    ready, port = prepared(config, model)
    with Session(ready, model, port) as session:
        session.weights.publish(1)
    me = psutil.Process()
    row = [me.num_fds(), threading.active_count(), len(me.children()), me.memory_info().rss >> 10]
    print(json.dumps(row), flush=True)
"""


@only_long
def test_sessions_in_one_process_leave_nothing_behind(tmp_path: Path) -> None:
    known = set(os.listdir(RAY)) if RAY.exists() else set()
    with subprocess.Popen(
        [sys.executable, "-c", SESSIONS, str(ROOT / "configs/tiny.yaml"), str(tmp_path), "6"],
        cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        output, _ = process.communicate(timeout=1700)
    rows = [tuple(map(int, line.strip("[]\n").split(","))) for line in output.splitlines() if line.startswith("[")]
    assert process.returncode == 0 and len(rows) == 6
    (fds, threads, children, kib), last = rows[1], rows[-1]
    assert last[0] <= fds + 4 and last[1] <= threads + 2 and last[2] <= children
    assert last[3] <= kib + 4 * 16 * 1024
    assert sessions_of(RAY, process.pid) <= known
