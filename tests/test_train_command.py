"""`raygym train` as a user runs it: in processes of its own, started, finished, interrupted, submitted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_head import PATIENCE, ray_head
from tiers import only_long

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "raygym"]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]


def environment(**changes: str) -> dict[str, str]:
    # Each command starts its own cluster; one that pytest runs inside, if any, must not be joined.
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return PATIENCE | inherited | changes


def leftovers(mark: str) -> list[str]:
    """Processes started by a command with this mark in its environment, once those that are ending have ended."""
    deadline = time.monotonic() + 120
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAYGYM_TEST") == mark:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
            except psutil.Error:
                continue  # it has ended, is a zombie, or is not ours to read
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SIMULATED = ["policy.engine=simulated", "checkpoint.save_final=false"]


def test_failures_are_retried_and_an_interrupt_stops_everything(tmp_path: Path) -> None:
    arguments = ["train", "configs/tiny.yaml", f"runs_dir={tmp_path}", *SIMULATED, "policy.simulated.error_rate=0.1",
                 "validation.every=1"]  # fmt: skip
    with subprocess.Popen(
        [*COMMAND, *arguments, "steps=100000"], cwd=ROOT, env=environment(RAYGYM_TEST=str(tmp_path)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.lstrip().startswith("4/100000 "):
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=400)
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert leftovers(str(tmp_path)) == []

    metrics = rows(tmp_path / "tiny")
    assert [row["step"] for row in metrics][:5] == [0, 1, 2, 3, 4]
    # The last one may have been cut off; its row is there all the same.
    assert all("val/reward" in row and "time/validate_s" in row for row in metrics[:-1])
    for step in range(4):
        played = (tmp_path / f"tiny/trajectories/validation_{step:06d}.jsonl").read_text().splitlines()
        assert 0 < len(played) <= 8
        # Overlapping the next step, and of one version all the same: -1 is what the policy did not generate.
        assert {version for line in played for version in json.loads(line)["weight_versions"]} == {-1, step}
    assert sum(row.get("episodes/failed/engine_error", 0) for row in metrics) > 0
    assert all(row["episodes/completed"] == 16 for row in metrics[1:])
    ledger = [json.loads(line) for line in (tmp_path / "tiny/ledger.jsonl").read_text().splitlines()]
    assert sorted(line["task"] for line in ledger) == list(range(len(ledger)))
    assert sum(line["trained"] for line in ledger) % 4 == 0


@only_long  # the scheduler's own tests stop as well, without the half minute of a start
def test_an_environment_that_always_fails_ends_the_command_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import raygym\n\n\nclass Broken(raygym.ChatEnv):\n"
        "    def reset(self, *, seed=None, options=None):\n        raise OSError('no database')\n"
    )
    done = subprocess.run(
        [*COMMAND, "eval", str(ROOT / "configs/tiny.yaml"), *SIMULATED, "envs.0={id: 'broken:Broken'}",
         "validation.tasks=64"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken:Broken" in done.stderr
    assert "no database" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    with ray_head() as started:
        yield started


@pytest.mark.vllm
def test_train_directly_and_as_a_submitted_job_give_the_same_run(head: dict[str, str], tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    run = subprocess.run(
        [*COMMAND, "train", "configs/tiny.yaml", f"runs_dir={tmp_path}/direct"],
        cwd=ROOT, env=environment(TMPDIR=str(temporary), RAY_TMPDIR="/tmp"),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    # vLLM's sockets and files are gone, too; PyTorch's cache is there for the next run.
    assert [entry.name for entry in temporary.iterdir() if not entry.name.startswith("torchinductor_")] == []
    job = subprocess.run(
        [head["ray"], "job", "submit", "--address", head["dashboard"], "--working-dir", ".", "--",
         sys.executable, "-m", "raygym", "train", "configs/tiny.yaml", f"runs_dir={tmp_path}/job"],
        cwd=ROOT, env=environment(**{key: value for key, value in head.items() if key.startswith("RAY_")}),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    direct, submitted = rows(tmp_path / "direct/tiny"), rows(tmp_path / "job/tiny")
    assert [row["step"] for row in submitted] == [row["step"] for row in direct] == [0, 1, 2, 3]
    for a, b in zip(direct, submitted, strict=True):
        assert a.get("val/reward") == b.get("val/reward")
    assert all(row["policy/logprob_abs_diff_max"] < 1e-3 for row in direct[1:])
    summary = json.loads((tmp_path / "direct/tiny/summary.json").read_text())
    assert summary["policy_version"] == 3
    assert 0 < summary["ready_s"] < summary["first_token_s"] < summary["seconds"]
    assert direct[-1]["sync/checksum"] == summary["weights_checksum"]
    assert (tmp_path / "direct/tiny/checkpoints/latest").read_text().strip() == "step_000003"


def test_the_readmes_environment_of_a_users_own(tmp_path: Path) -> None:
    """The very text of the README, in a folder of its own, on the simulated engine."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## A run of your own")[1]
    blocks = [block.split("```")[0] for block in section.split("```yaml\n")[1:2] + section.split("```python\n")[1:2]]
    for block in blocks:
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    assert len(blocks[1].splitlines()) <= 30
    small = ["steps=1", "policy.model=tiny", "rollout.groups_per_step=2", "rollout.group_size=2", "validation.tasks=4"]
    done = subprocess.run(
        [*COMMAND, "train", "guess.yaml", *SIMULATED, *small],
        cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "runs/guess")[-1]["episodes/completed"] == 4
