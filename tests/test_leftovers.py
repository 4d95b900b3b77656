"""However `raygym train` ends, nothing of it stays: processes, Ray's files, shared memory, temporary files."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_nodes import named
from started_run import RAY, SHARED_MEMORY, StartedRun, started_run, step_was_made
from tiers import LONG, only_long

from raygym.resume import only_writer

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
SEEDS = [0, 1, 2] if LONG else [0]


def interrupt(run: StartedRun) -> int:
    run.send(signal.SIGINT)
    return 130


def terminate(run: StartedRun) -> int:
    run.send(signal.SIGTERM)
    return 130


def interrupt_twice(run: StartedRun) -> int:
    """The second one while it stops, as by an impatient user."""
    run.send(signal.SIGINT)
    time.sleep(1)
    if run.process.poll() is None:
        run.send(signal.SIGINT)
    return 130


def kill(run: StartedRun) -> int:
    run.send(signal.SIGKILL)
    return -signal.SIGKILL


def fail(run: StartedRun) -> int:
    """A learner is gone, which a run without `supervision.learner_restarts` does not survive."""
    learner = named("LearnerActor", run.members())[0]
    learner.kill()
    return 1


def finish(run: StartedRun) -> int:
    return 0


ENDS: list[Callable[[StartedRun], int]] = [interrupt, terminate, interrupt_twice, kill]


def assert_nothing_left(run: StartedRun, *, logs_kept: bool) -> None:
    assert run.left() == []
    deadline = time.monotonic() + 180  # Ray's directory goes after the last process, by the cluster's guard
    while run.session is not None and not logs_kept and time.monotonic() < deadline:
        time.sleep(0.1)
    if logs_kept:
        assert run.session is not None
        assert {path.name for path in run.session.iterdir()} <= {"logs", "kept-by-raygym"}
        assert (run.session / "logs/raylet.out").exists()
    else:
        assert run.session is None
        latest = RAY / "session_latest"
        assert not latest.is_symlink() or latest.exists() or not os.readlink(latest).endswith(f"_{run.process.pid}")
    made = set(os.listdir(SHARED_MEMORY)) - run.shared_memory
    assert [name for name in made if "raygym" in name or "plasma" in name or f"{run.process.pid}" in name] == []
    # PyTorch's cache of compiled code, one a user, is there to be found by the next run.
    left = [path for path in (run.folder / "tmp").iterdir() if not path.name.startswith("torchinductor_")]
    assert left == []
    with only_writer(run.folder / "runs/tiny"):
        pass  # the lock is free


@pytest.mark.parametrize("seed", SEEDS)
# A single interrupt, of a run on real vLLM, is in test_train_command.
@pytest.mark.parametrize("end", [pytest.param(interrupt, marks=only_long), *ENDS[1:]])
def test_in_the_middle_of_training(end: Callable[[StartedRun], int], seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{end.__name__} {seed}")
    with started_run(tmp_path, "checkpoint.every=2") as run:
        run.wait_for(step_was_made(1 + rng.randrange(4)))
        time.sleep(rng.random())
        expected = end(run)
        assert run.wait() == expected, run.output
        assert "Traceback" not in run.output
        assert_nothing_left(run, logs_kept=end is kill)


@only_long
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("end", ENDS)
def test_while_it_starts(end: Callable[[StartedRun], int], seed: int, tmp_path: Path) -> None:
    """From before Ray is up to when engines, learners and runners load."""
    rng = random.Random(f"start {end.__name__} {seed}")
    with started_run(tmp_path) as run:
        run.wait_for(lambda run: "starting engines" in run.output)
        time.sleep(rng.uniform(0, 15))
        expected = end(run)
        assert run.wait() == expected, run.output
        assert "Traceback" not in run.output
        run.session  # noqa: B018 - there may be none
        assert run.left() == []


@only_long
def test_after_its_last_step_and_after_an_error(tmp_path: Path) -> None:
    with started_run(tmp_path, "steps=2") as run:
        run.wait_for(lambda run: "stopping" in run.output)
        assert run.wait() == 0, run.output
        assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["steps"] == 2
        assert_nothing_left(run, logs_kept=False)
    with started_run(tmp_path, "--fresh", "supervision.learner_restarts=0") as run:
        run.wait_for(step_was_made(2))
        expected = fail(run)
        assert run.wait() == expected, run.output
        assert f"logs of it are kept in {run.session}/logs" in run.output
        assert_nothing_left(run, logs_kept=True)
