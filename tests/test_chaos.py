"""`raygym train` under random faults: it ends as if nothing had happened, and leaves nothing behind.

Each run draws from its seed what happens to it: a plan of faults at points in the code, and a monkey that strikes at
its processes. Faults of parts that cannot recover in this version of raygym are not drawn (`Draw.needs`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos_report import recoveries, report
from run_audit import audit, lines_of
from test_train_command import COMMAND, ROOT, environment, leftovers
from tiers import LONG

from raygym.testing.chaos import Fault, Plan, claims_folder
from raygym.testing.chaos_monkey import Action, ChaosMonkey
from raygym.testing.claims import Claims, Fired

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS = 15
SEEDS = range(50 if LONG else 5)
FAULTS_A_RUN = 4
DEADLINE_S = 1200
"""Of one run: it must end by itself long before."""
_GANG = "raygym.supervision"
"""Restarts of the learner gang in place."""
_SYNC = "raygym.lease"
"""Replicas that are lost catch up."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One kind of trouble that a run can get."""

    point: str
    kinds: tuple[str, ...]
    hits: tuple[int, int]
    """The least and the most for `Fault.hit`, so that it comes within the run."""
    seconds: tuple[float, float] = (0.0, 0.0)
    needs: str = ""
    """A module without which raygym does not recover from it."""

    def fault(self, draw: random.Random) -> Fault:
        kind: Any = draw.choice(self.kinds)
        return Fault(self.point, kind, hit=draw.randint(*self.hits), seconds=round(draw.uniform(*self.seconds), 2))


# At these sizes a run has 240 episodes of up to 3 turns in two EnvRunners, and writes 5 checkpoints or more.
DRAWS = (
    Draw("episode.step", ("kill", "stop", "slow", "exhaust_memory"), (5, 200), (0.3, 3.0)),
    Draw("env.step", ("slow", "drop", "exhaust_memory"), (5, 200), (0.1, 1.0)),
    Draw("manager.collect", ("kill", "stop", "slow"), (2, STEPS - 2), (0.3, 3.0)),
    Draw("turn.answer", ("drop", "kill", "slow"), (5, 60), (0.1, 1.0)),
    Draw("turn.ask", ("drop",), (5, 100)),
    Draw("disk.append", ("fill_disk",), (4, 40), (0.5, 2.0)),
    Draw("disk.*", ("fill_disk",), (4, 60), (0.5, 2.0)),
    Draw("disk.checkpoint", ("fill_disk",), (1, 5), (0.5, 2.0)),
    Draw("disk.learner_state", ("fill_disk",), (1, 5), (0.5, 2.0)),
    Draw("disk.policy", ("fill_disk",), (1, 5), (0.5, 2.0)),
    Draw("learner.update.begin", ("kill", "stop", "slow"), (2, STEPS - 2), (0.3, 3.0), needs=_GANG),
    Draw("learner.update.mid", ("kill", "stop", "drop", "exhaust_memory"), (2, STEPS - 2), (0.3, 3.0), needs=_GANG),
    Draw("learner.update.end", ("kill", "stop"), (2, STEPS - 2), (0.3, 3.0), needs=_GANG),
    Draw("learner.save_state", ("kill", "stop"), (1, 4), (0.3, 3.0), needs=_GANG),
    Draw("replica.turn", ("kill", "stop", "drop", "slow"), (5, 200), (0.3, 3.0), needs=_SYNC),
    Draw("sync.bucket", ("kill", "stop", "drop", "corrupt"), (2, STEPS - 2), (0.3, 3.0), needs=_SYNC),
    Draw("sync.apply", ("kill", "stop", "drop", "slow"), (2, STEPS - 2), (0.3, 3.0), needs=_SYNC),
)
STRIKES = {"env_runner": "", "manager": "", "learner": _GANG, "replica": _SYNC, "weight_store": _SYNC}


def here(needs: str) -> bool:
    return not needs or importlib.util.find_spec(needs) is not None


@dataclass(frozen=True, slots=True)
class Trouble:
    """What one run gets."""

    plan: Plan
    strikes: int
    kinds: tuple[str, ...]
    actions: tuple[Action, ...]
    max_staleness: int
    checkpoint_every: int

    @classmethod
    def drawn(cls, seed: int) -> Trouble:
        draw = random.Random(seed)
        possible = [each for each in DRAWS if here(each.needs)]
        # The first one goes round, so that few seeds meet all of them.
        faults = [possible[seed % len(possible)], *draw.choices(possible, k=FAULTS_A_RUN - 1)]
        kinds = tuple(kind for kind, needs in STRIKES.items() if here(needs))
        return cls(
            Plan(tuple(each.fault(draw) for each in faults), seed),
            draw.randrange(3),
            kinds,
            ("kill", "stop"),
            draw.randrange(3),
            draw.choice((2, 3)),
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that is over."""

    run: Path
    output: str
    returncode: int
    fired: list[Fired]
    left: list[str]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For temporary files of a run: Ray puts Unix sockets below it, whose names may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="rg"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def in_use() -> str:
    """What the processes of this machine have mapped or open of /dev/shm."""
    found = []
    for process in psutil.process_iter():
        try:
            found += [part.path for part in process.memory_maps()]
            found += [file.path for file in process.open_files()]
        except (psutil.Error, OSError):
            continue  # it has ended, or is not ours to read
    return "\n".join(path for path in found if path.startswith("/dev/shm"))


def shared_memory_left(before: set[str]) -> list[str]:
    """What is new in /dev/shm and nobody's, also after a while: other runs on this machine come and go, too."""
    left, deadline = shared_memory() - before, time.monotonic() + 60
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        used = in_use()
        left = {name for name in left & shared_memory() if name not in used}
    return [f"/dev/shm/{name}" for name in sorted(left)]


def play(folder: Path, temporary: Path, seed: int, trouble: Trouble) -> Ended:
    """One run, from its start to its end."""
    settings = {
        "name": "chaos",
        "seed": seed,
        "runs_dir": str(folder / "runs"),
        "steps": STEPS,
        "policy.engine": "simulated",
        "policy.simulated.turn_latency_s": 0.03,
        "policy.replicas": 2,
        "learner.num_learners": 2,
        "learner.threads": 1,
        "rollout.env_runners": 2,
        "rollout.max_staleness": trouble.max_staleness,
        "rollout.max_retries": 10,
        "sync.lease_s": 5,
        "sync.timeout_s": 20,
        "logging.tensorboard": "false",
        "checkpoint.every": trouble.checkpoint_every,
        "validation.tasks": 4,
        "validation.every": 5,
    }
    plan, mark = folder / "plan.json", f"chaos-{temporary.name}"
    variables = environment(RAYGYM_TEST=mark, TMPDIR=str(temporary), **trouble.plan.environment(plan))
    before = shared_memory()
    lines = []
    with subprocess.Popen(
        [*COMMAND, "train", str(ROOT / "configs/tiny.yaml"), *(f"{key}={value}" for key, value in settings.items())],
        cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process, ExitStack() as ends:  # fmt: skip
        late = threading.Timer(DEADLINE_S, process.kill)
        late.start()
        ends.callback(late.cancel)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready after") and trouble.strikes:  # before, a lost process is a failed start
                monkey = ChaosMonkey(
                    process.pid, claims_folder(plan), seed=seed, kinds=trouble.kinds, actions=trouble.actions,
                    every_s=(0.5, 4.0), strikes=trouble.strikes,
                )  # fmt: skip
                ends.enter_context(monkey)
    left = leftovers(mark)
    left += shared_memory_left(before)
    # Ray keeps its logs, and PyTorch a cache.
    left += [str(entry) for entry in temporary.iterdir() if not entry.name.startswith(("ray", "torchinductor_"))]
    fired = Claims(claims_folder(plan)).fired()
    return Ended(folder / "runs/chaos", "".join(lines), process.returncode, fired, left)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_ends_as_if_nothing_had_happened(seed: int, tmp_path: Path, short_folder: Path) -> None:
    trouble = Trouble.drawn(seed)
    ended = play(tmp_path, short_folder, seed, trouble)
    told = f"{ended.output}\n{trouble}\n" + "\n".join(map(str, ended.fired))
    print(told)
    assert ended.returncode == 0, told
    assert "Traceback" not in ended.output
    assert ended.fired, "something happened"
    audit(ended.run, STEPS)
    rows = lines_of(ended.run / "metrics.jsonl")
    assert all(row["policy/staleness_max"] <= trouble.max_staleness for row in rows[1:])
    summary = json.loads((ended.run / "summary.json").read_text())
    assert summary["policy_version"] == STEPS
    assert summary["weights_checksum"] == rows[-1]["sync/checksum"]
    assert summary["checkpoint"] == str(ended.run / f"checkpoints/step_{STEPS:06d}"), "the last one waits for room"
    # What each engine serves at the end, where the run tells it.
    assert set(summary.get("replicas", {"none": summary["weights_checksum"]}).values()) == {summary["weights_checksum"]}
    assert not [entry for entry in (ended.run / "checkpoints").iterdir() if ".tmp-" in entry.name]
    assert ended.left == []
    note_recoveries(ended)


def note_recoveries(ended: Ended) -> None:
    """Into the run's folder, and into the file that RAYGYM_CHAOS_REPORT names, a line for each run."""
    events = lines_of(ended.run / "events.jsonl") if (ended.run / "events.jsonl").exists() else []
    seconds = recoveries(ended.fired, events)
    (ended.run / "recoveries.json").write_text(json.dumps({"seconds": seconds, "report": report(seconds)}) + "\n")
    if path := os.environ.get("RAYGYM_CHAOS_REPORT"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(seconds) + "\n")


def test_the_same_seed_draws_the_same_trouble() -> None:
    assert [Trouble.drawn(seed) for seed in range(20)] == [Trouble.drawn(seed) for seed in range(20)]
    first = {Trouble.drawn(seed).plan.faults[0].point for seed in range(50)}
    assert first == {each.point for each in DRAWS if here(each.needs)}


def test_recoveries_are_from_a_fault_to_the_next_recovery_of_its_kind() -> None:
    fired = [
        Fired("2026-01-01T00:00:00.000+00:00", 1, "monkey.learner", "kill"),
        Fired("2026-01-01T00:00:10.000+00:00", 1, "learner.update.mid", "kill"),
        Fired("2026-01-01T00:00:11.000+00:00", 1, "disk.append", "fill_disk"),
        Fired("2026-01-01T00:00:20.000+00:00", 1, "learner.update.mid", "stop"),
        Fired("2026-01-01T00:00:30.000+00:00", 1, "sync.bucket", "drop"),
    ]
    events = [
        {"time": "2026-01-01T00:00:01+00:00", "kind": "learner", "what": "lost"},
        {"time": "2026-01-01T00:00:02+00:00", "kind": "env_runner", "what": "recovered"},
        {"time": "2026-01-01T00:00:04+00:00", "kind": "learner", "what": "recovered"},
        {"time": "2026-01-01T00:00:11+00:00", "kind": "learner", "what": "lost"},
        {"time": "2026-01-01T00:00:16+00:00", "kind": "learner", "what": "recovered"},
        # Nobody noticed the stop.
        {"time": "2026-01-01T00:00:31+00:00", "kind": "learner", "what": "lost"},
        {"time": "2026-01-01T00:00:39+00:00", "kind": "learner", "what": "recovered"},
    ]
    assert recoveries(fired, events) == {"learner/kill": [4.0, 6.0], "learner/drop": [9.0]}
    assert report({"learner/kill": [4.0, 6.0]}) == {"learner/kill": {"recoveries": 2, "p50_s": 5.0, "max_s": 6.0}}
