"""The fault benchmark: what it injects, how it counts, and in the long tier what it finds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiers import only_long

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Load:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    return importlib.import_module


def outcomes(faulty: ModuleType, said: list[str], seeds: range, **rates: float) -> list[tuple[str, float]]:
    """Of each seed and first answer: how the episode of three turns ends, and its reward by then."""
    ends = []
    for seed in seeds:
        for text in said:
            env = faulty.Faulty(turns=3, hang_s=0.0, **rates)
            env.reset(seed=seed)
            reward, end = 0.0, False
            try:
                while not end:
                    _, more, end, _, _ = env.step({"content": text})
                    reward += more
            except RuntimeError:
                ends.append(("raised", reward))
            else:
                ends.append(("ended", reward))
    return ends


def test_faults_repeat_and_no_reward_of_an_episode_that_has_one_looks_like_another(load: Load) -> None:
    faulty = load("harness.faulty")
    said = [str(i) for i in range(5)]
    rates = {"raise_rate": 0.05, "hang_rate": 0.01, "lost_tasks": 0.02}
    ends = outcomes(faulty, said, range(400), **rates)
    assert ends == outcomes(faulty, said, range(400), **rates)
    raised = [reward for end, reward in ends if end == "raised"]
    assert 0.05 < len(raised) / len(ends) < 0.09 and set(raised) == {2 * faulty.DOOMED_REWARD}
    # A block of no seconds ends the episode: with the reward that tells of it.
    rewards = [reward for end, reward in ends if end == "ended"]
    assert set(rewards) == {3 * faulty.TURN_REWARD, 3 * faulty.DOOMED_REWARD}
    per_task = [[end for end, _ in ends[at : at + 5]] for at in range(0, len(ends), 5)]
    lost = sum(task == ["raised"] * 5 for task in per_task)
    assert 1 <= lost <= 20, "tasks that no retry helps"
    assert sum(set(task) == {"raised", "ended"} for task in per_task) > 40, "tasks that one does"


def test_without_rates_nothing_goes_wrong(load: Load) -> None:
    assert set(outcomes(load("harness.faulty"), ["a", "b"], range(50))) == {("ended", 3.0)}


def test_the_moments_of_faults_are_drawn_from_the_seed(load: Load) -> None:
    faults = load("harness.faults")
    drawn = faults.draw_faults(7, 100.0, 30.0)
    assert drawn == faults.draw_faults(7, 100.0, 30.0) != faults.draw_faults(8, 100.0, 30.0)
    assert sorted((f.victim, f.hung_s) for f in drawn) == [
        ("manager", 0.0),
        ("replica", 0.0),
        ("replica", 30.0),
        ("runner", 0.0),
    ]
    assert all(10 <= f.at_s <= 80 for f in drawn) and drawn == sorted(drawn, key=lambda f: f.at_s)


def test_waits_are_written_down_however_they_end(load: Load, tmp_path: Path) -> None:
    waits = load("harness.waits")
    log = waits.WaitLog(str(tmp_path / "waits"))
    assert log.read() == []
    with log.wait("attempt", group_id="g", episode=1, attempt=2) as outcome:
        outcome[0] = "env_error"
    with pytest.raises(waits.EpisodeFailure), log.wait("turn"):
        raise waits.EpisodeFailure("engine_lost", "gone")
    with pytest.raises(KeyError), log.wait("turn"):
        raise KeyError("x")
    read = log.read()
    assert [(w.what, w.outcome, w.group_id) for w in read] == [
        ("attempt", "env_error", "g"),
        ("turn", "engine_lost", ""),
        ("turn", "KeyError", ""),
    ]
    assert waits.longest_s(read, "turn") == max(w.seconds for w in read[1:]) and waits.longest_s(read, "step") == 0.0


@only_long
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rollouts_under_faults(request: pytest.FixtureRequest) -> None:
    script = request.config.rootpath / "benchmarks" / "rollout_faults.py"
    environment = {**os.environ, "RAYGYM_BENCH_CALIBRATION": "off"}
    command = [sys.executable, script, "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-5000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    metrics = result["metrics"]
    assert len(result["details"]["faults"]) == 4, "each fault hit a process"
    assert metrics["groups_completed_or_replaced_share"] == 1.0
    leaks = {key: value for key, value in metrics.items() if key.startswith("leaked") and not key.endswith("spread")}
    assert metrics["failures_scored"] == 0 and set(leaks.values()) == {0}, leaks
    assert metrics["failed_attempts_share"] > 0.03 and metrics["manager_restarts"] >= 1
    # A machine that is busy hands a missed deadline on late.
    assert metrics["longest_wait_over_deadline"] < 1.5
