"""`raygym train` in processes of its own, parts of which are killed at a moment drawn by a seed, and started again.

A lost manager or learner is made good by the run itself; what else is lost, by starting it again.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_audit import audit
from test_train_command import COMMAND, ROOT, environment, rows
from tiers import LONG, only_long

from raygym.testing.chaos import Fault, Plan

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 20 if LONG else 6
# A reward that depends on every token, so that there is always something to learn from. It can be held, see `hold`.
LETTERS = """
import time
import zlib
from pathlib import Path

import raygym

HERE = Path(__file__).parent


def held():
    try:
        file, text, times = (HERE / "hold").read_text().splitlines()
        return (HERE / file).read_text().count(text) >= int(times)
    except FileNotFoundError:
        return False


class Letters(raygym.ChatEnv):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turns = 0
        while held():
            time.sleep(0.05)
        return f"Say {seed}.", {}

    def step(self, action):
        self.turns += 1
        return "More.", zlib.crc32(action["content"].encode()) % 16 / 16, self.turns == 2, False, {}
"""
# Differs from run to run: times, and what tells of the interruptions themselves.
CLOCKS = (
    "time/",
    "manager/",
    "learn/tokens_per_s",
    "learn/tflops_per_s",
    "sync/broadcast_s",
    "sync/apply_s",
    "sync/gib_per_s",
    "supervision/",
)
SIMULATED = ["policy.engine=simulated", "policy.simulated.turn_latency_s=0.1"]
# One turn after the other: what shares a batch changes the last bits of a real engine's numbers.
VLLM = ["policy.engine=vllm", "rollout.max_concurrent=1", "policy.vllm.max_num_seqs=1"]


def command(folder: Path, name: str, engine: list[str], **changes: Any) -> list[str]:
    settings = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "steps": STEPS,
        "envs": "[{id: 'letters:Letters'}]",
        "learner.lr": 1e-3,
        "learner.threads": 1,
        "checkpoint.every": 2,
        "validation.every": 3,
        "logging.tensorboard": "false",
        **changes,
    }
    return [*COMMAND, "train", str(ROOT / "configs/tiny.yaml"), *engine, *(f"{k}={v}" for k, v in settings.items())]


def start(
    folder: Path, name: str, engine: list[str], plan: Plan | None = None, **changes: Any
) -> subprocess.Popen[str]:
    (folder / "letters.py").write_text(LETTERS)
    variables = plan.environment(folder / "plan.json") if plan else {}
    return subprocess.Popen(
        command(folder, name, engine, **changes), cwd=folder, env=environment(PYTHONPATH=str(ROOT), **variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def hold(folder: Path, file: str, text: str, times: int = 1) -> Path:
    """No episode begins any more once the run's file has the text so often, until what is returned is unlinked: however
    late it is looked at, the run is not over."""
    held = folder / "hold"
    held.write_text(f"{file}\n{text}\n{times}\n")
    return held


def finish(process: subprocess.Popen[str], returncode: int = 0) -> str:
    """What it printed from here to its end."""
    output, _ = process.communicate(timeout=900)
    assert process.returncode == returncode, output
    return output


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while not (run / "ledger.jsonl").exists() or f'{{"step": {step},' not in (run / "ledger.jsonl").read_text():
        assert time.monotonic() < deadline, f"step {step} was not made in time"
        time.sleep(0.01)


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue  # it went with another one


def named(driver: psutil.Process, *names: str) -> list[psutil.Process]:
    """Processes below the driver whose command line has one of the names in it."""
    found = []
    for process in driver.children(recursive=True):
        try:
            if any(name in " ".join(process.cmdline()) for name in names):
                found.append(process)
        except psutil.Error:
            continue
    assert found, f"no process is called {names}"
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    """Whatever happened to the driver, nothing of its run goes on. Ray's own agents take their time; they are ended."""
    _, alive = psutil.wait_procs([process for process in processes if not is_agent(process)], timeout=180)
    left = [process.name() for process in alive]
    kill([*processes, *alive])
    assert not left


def is_agent(process: psutil.Process) -> bool:
    try:
        return "Agent" in process.name()
    except psutil.NoSuchProcess:
        return True


VICTIMS: dict[str, Callable[[psutil.Process], list[psutil.Process]]] = {
    "trainer": lambda driver: [driver],
    "manager": lambda driver: named(driver, "ray::RolloutManager"),
    "learner": lambda driver: named(driver, "ray::LearnerActor"),
    "cluster": lambda driver: driver.children(recursive=True),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run that nobody disturbs, by engine; made where it is first asked for."""
    made: dict[str, Path] = {}

    def run(engine: str) -> Path:
        if engine not in made:
            folder = tmp_path_factory.mktemp(engine)
            finish(start(folder, "whole", ENGINES[engine]))
            made[engine] = folder / "runs/whole"
        return made[engine]

    return run


ENGINES = {"simulated": SIMULATED, "vllm": VLLM}


def cases() -> Iterator[Any]:
    for victim in VICTIMS:
        yield pytest.param(victim, "simulated", 1, marks=[] if victim == "trainer" else only_long)
    for victim in ("trainer", "learner"):
        yield pytest.param(victim, "vllm", 2, marks=[only_long, pytest.mark.vllm])


@pytest.mark.parametrize(("victim", "engine", "seed"), list(cases()))
def test_a_killed_part_costs_no_task_and_repeats_none(
    victim: str, engine: str, seed: int, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    draw = random.Random(f"{seed} {victim}")
    run = tmp_path / "runs/killed"
    held = hold(tmp_path, "runs/killed/ledger.jsonl", f'{{"step": {STEPS - 2},')
    first = start(tmp_path, "killed", ENGINES[engine])
    driver = psutil.Process(first.pid)
    wait_for_step(run, draw.randrange(2, STEPS - 2))
    time.sleep(draw.random())
    below = driver.children(recursive=True)
    kill(VICTIMS[victim](driver))
    held.unlink()
    if victim in ("manager", "learner"):  # it has a successor, and the run goes on
        finish(first)
        assert recovered(run) == [victim]
    else:
        output = finish(first, -signal.SIGKILL if victim == "trainer" else 1)
        if victim != "trainer":  # without a cluster, Ray ends the process in its own words
            told = "The program will terminate" if victim == "cluster" else "raygym: train failed: "
            # What Ray's own code prints as it ends the process is in the log that the console has named.
            printed = output + (run / "logs/driver.log").read_text(errors="replace")
            assert told in printed or "raygym: train failed: " in output, "the cause is told"
            assert "driver.log" in output
        assert_gone(below)
        assert "resuming " in finish(start(tmp_path, "killed", ENGINES[engine]))
    audit(run, STEPS)
    whole = uninterrupted(engine)
    assert shown(run) == shown(whole), "it is the run that nobody has disturbed"
    assert len({row["sync/checksum"] for row in rows(run) if "sync/checksum" in row}) == STEPS, "every step learned"
    assert "has made its" in finish(start(tmp_path, "killed", ENGINES[engine]))


@pytest.mark.parametrize("validate_every", [1, pytest.param(3, marks=only_long)])
def test_learners_that_are_lost_twice_are_started_again_in_place(
    validate_every: int, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """First without a checkpoint, then with one. Engines and runners stay, and the result is that of a whole run.

    In step 2 of the first gang and in step 4 of the second, which has made 1 to 3 again: struck from outside, one could
    be lost a checkpoint later.
    """
    run = tmp_path / "runs/lost"
    plan = Plan(tuple(Fault("learner.update.begin", "kill", hit=hit) for hit in (2, 4)))
    held = hold(tmp_path, "runs/lost/events.jsonl", '"recovered"', 2)
    process = start(tmp_path, "lost", SIMULATED, plan, **{"validation.every": validate_every})
    driver = psutil.Process(process.pid)
    wait_for_step(run, 1)
    stay = named(driver, "ray::ServeReplica", "ray::EnvRunner")
    wait_for_event(run, "recovered", 2)
    assert all(part.is_running() for part in stay)
    held.unlink()
    output = finish(process)
    audit(run, STEPS)
    assert [event["what"] for event in events(run)] == ["lost", "restarted", "recovered"] * 2
    assert recovered(run) == ["learner", "learner"]
    lost, _, back = events(run)[:3]
    assert "learner rank 0 of 1 failed in" in lost["cause"] and back["recovery_s"] > 0
    assert f"the learner gang is back after {back['recovery_s']:.1f} s" in output
    assert {path.name[-12:] for path in (run / "discarded").iterdir()} == {"after-step-0", "after-step-2"}
    if validate_every == 3:
        assert shown(run) == shown(uninterrupted("simulated"))
    else:  # a validation was in flight each time; it is there, once
        assert all("val/failed" in row for row in rows(run))
        ours, theirs = ([row.get("sync/checksum") for row in rows(path)] for path in (run, uninterrupted("simulated")))
        assert ours == theirs
    assert [row["supervision/learner_restarts"] for row in rows(run) if "supervision/learner_restarts" in row] == [1, 1]
    assert json.loads((run / "summary.json").read_text())["restarts"] == {"learner": 2}


@only_long
def test_a_rank_that_hangs_is_lost_with_its_gang(tmp_path: Path) -> None:
    """Two ranks under ZeRO-3, one of which is stopped."""
    run = tmp_path / "runs/hung"
    options = {"learner.num_learners": 2, "learner.deepspeed": "{zero_optimization: {stage: 3}}"}
    process = start(tmp_path, "hung", SIMULATED, **options, **{"learner.update_timeout_s": 30, "checkpoint.every": 1})
    wait_for_step(run, 2)
    ranks = named(psutil.Process(process.pid), "ray::LearnerActor")
    assert len(ranks) == 2
    ranks[1].suspend()
    finish(process)
    audit(run, STEPS)
    assert recovered(run) == ["learner"]
    # The stopped one leaves the other waiting, and whichever is found first is named.
    assert "learner rank" in events(run)[0]["cause"]


@only_long
def test_learners_that_are_lost_too_often_end_the_run_with_the_cause(tmp_path: Path) -> None:
    run = tmp_path / "runs/budget"
    process = start(tmp_path, "budget", SIMULATED, **{"supervision.learner_restarts": 0})
    driver = psutil.Process(process.pid)
    wait_for_step(run, 1)
    below = driver.children(recursive=True)
    kill(named(driver, "ray::LearnerActor"))
    output = finish(process, 1)
    assert_gone(below)
    (told,) = (line for line in output.splitlines() if line.startswith("raygym: train failed: "))
    assert told.startswith("raygym: train failed: learner rank 0 of 1 failed in ")
    assert "supervision.learner_restarts allows 0" in told
    assert output.index("the learner gang is given up: learner rank 0 of 1") < output.index("stopping")
    assert [event["what"] for event in events(run)] == ["lost", "given_up"]
    assert "Traceback" not in output


@only_long
def test_with_stale_data_what_was_whole_is_trained_once(tmp_path: Path) -> None:
    """Steps ahead are in play at every checkpoint; killed three times, then with two learners under ZeRO-3."""
    run, draw = tmp_path / "runs/stale", random.Random(3)
    options: dict[str, Any] = {"rollout.max_staleness": 2, "checkpoint.every": 1}
    for step in (4, 8, 12):
        process = start(tmp_path, "stale", SIMULATED, **options)
        wait_for_step(run, step)
        time.sleep(draw.random() / 2)
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        finish(process, -signal.SIGKILL)
        assert_gone(below)
    more = {"learner.num_learners": 2, "learner.deepspeed": "{zero_optimization: {stage: 3}}"}
    output = finish(start(tmp_path, "stale", SIMULATED, **options, **more))
    assert "changed: learner.num_learners: 1 -> 2" in output
    audit(run, STEPS)
    assert any((run / "checkpoints").glob("step_*/training_state/groups.safetensors"))
    assert all(row["policy/staleness_max"] <= 2 for row in rows(run)[1:])


def events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # one may be being written


def recovered(run: Path) -> list[str]:
    """Kinds of what was lost and is back."""
    return [event["kind"] for event in events(run) if event["what"] == "recovered"]


def wait_for_event(run: Path, what: str, times: int = 1) -> None:
    deadline = time.monotonic() + 600
    while [event["what"] for event in events(run)].count(what) < times:
        assert time.monotonic() < deadline, f"{events(run)}: expected {what}"
        time.sleep(0.01)


def shown(run: Path) -> list[dict[str, Any]]:
    """The metrics that do not tell of time."""
    return [
        {key: value for key, value in row.items() if not key.startswith(CLOCKS) and not key.endswith("/step_s")}
        for row in rows(run)
    ]
