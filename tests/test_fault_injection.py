"""`raygym.testing.chaos` itself: faults come when the plan says, once, and are noted."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.config import ConfigError
from raygym.testing import chaos
from raygym.testing.chaos import ChaosPlanError, Fault, Plan
from raygym.testing.chaos_monkey import ChaosMonkey, processes
from raygym.testing.claims import Claims

ROOT = Path(__file__).parent.parent


def hits_of(point: str, count: int, error: type[BaseException]) -> list[int]:
    """Which of so many hits, counted from 1, raise."""
    raised = []
    for hit in range(1, count + 1):
        try:
            chaos.at(point)
        except error:
            raised.append(hit)
    return raised


def test_without_a_plan_a_point_costs_less_than_a_microsecond() -> None:
    least = float("inf")
    for _ in range(50):  # the quietest of many: other processes have the core as well
        began = time.perf_counter()
        for _ in range(1000):
            chaos.at("episode.step")
        least = min(least, time.perf_counter() - began)
    assert least / 1000 < 1e-6


def test_the_nth_hit_of_its_point_is_hit_once(tmp_path: Path) -> None:
    with chaos.active(Plan((Fault("a.b", "drop", hit=3),)), tmp_path / "fired") as claims:
        assert hits_of("a.c", 9, ConnectionError) == []
        assert hits_of("a.b", 9, ConnectionError) == [3]
        (fired,) = claims.fired()
    assert (fired.point, fired.kind, fired.pid) == ("a.b", "drop", os.getpid())
    assert abs(fired.seconds_since_epoch - time.time()) < 60
    assert datetime.fromisoformat(fired.time).tzinfo == UTC
    assert hits_of("a.b", 9, ConnectionError) == [], "no plan any more"


def test_what_has_fired_does_not_fire_after_a_restart(tmp_path: Path) -> None:
    plan = Plan((Fault("a.*", "drop", hit=2, times=2),))
    raised = []
    for _ in range(4):  # as in four processes, one after the other
        with chaos.active(plan, tmp_path):
            raised.append(hits_of("a.b", 3, ConnectionError))
    assert raised == [[2], [2], [], []]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), rate=st.sampled_from([0.05, 0.3, 1.0]), times=st.integers(1, 200))
def test_random_hits_follow_seed_and_rate(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rate: float, times: int
) -> None:
    plan = Plan((Fault("a", "drop", rate=rate, times=times),), seed)
    found = []
    for _ in range(2):
        with chaos.active(plan, tmp_path_factory.mktemp("fired")):
            found.append(hits_of("a", 200, ConnectionError))
    assert found[0] == found[1]
    assert len(found[0]) <= times
    if rate == 1.0:
        assert found[0] == list(range(1, min(times, 200) + 1))
    elif times == 200:
        assert len(found[0]) == pytest.approx(200 * rate, abs=5 * (200 * rate) ** 0.5)


def claim_all(folder: Path, ready: Any, claimed: Any) -> None:
    ready.wait()
    claimed.put(sum(Claims(folder).claim(0, 50) for _ in range(50)))


def test_many_processes_claim_each_fault_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, claimed = context.Barrier(4), context.Queue()
    workers = [context.Process(target=claim_all, args=(tmp_path, ready, claimed)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert sum(claimed.get(timeout=60) for _ in workers) == 50
    for worker in workers:
        worker.join(60)
    assert Claims(tmp_path).taken(0) == 50


def test_corruption_flips_so_many_bytes_where_they_are(tmp_path: Path) -> None:
    buffer = bytearray(1000)
    with chaos.active(Plan((Fault("sync.bucket", "corrupt", hit=1, count=3),)), tmp_path):
        chaos.at("sync.bucket", buffer)
    assert sorted(byte.bit_count() for byte in buffer)[-4:] == [0, 1, 1, 1]
    for data in (b"constant", None, bytearray()):
        with (
            chaos.active(Plan((Fault("a", "corrupt", hit=1),)), tmp_path / repr(data)),
            pytest.raises(ValueError, match=r"a hands over .* writable"),
        ):
            chaos.at("a", data)


def test_a_disk_is_full_for_so_many_hits(tmp_path: Path) -> None:
    with chaos.active(Plan((Fault("disk.*", "fill_disk", hit=2, hits=3),)), tmp_path):
        assert hits_of("disk.append", 9, OSError) == [2, 3, 4]


def test_a_disk_is_full_for_so_long_for_every_process(tmp_path: Path) -> None:
    plan = Plan((Fault("disk.*", "fill_disk", hit=2, seconds=60),))
    with chaos.active(plan, tmp_path) as claims:
        assert hits_of("disk.append", 4, OSError) == [2, 3, 4]
        with chaos.active(plan, tmp_path), pytest.raises(OSError, match="No space left") as raised:  # another process
            chaos.at("disk.policy")
        assert raised.value.errno == errno.ENOSPC
        assert [fired.seconds for fired in claims.fired()] == [60], "one fault, however often it is met"
        ago = time.time() - 61
        os.utime(tmp_path / "fault-000-000", (ago, ago))
        assert hits_of("disk.append", 9, OSError) == [], "there is room again"


def run_in_child(plan: Plan, folder: Path, program: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | plan.environment(folder / "chaos.json")
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)


HIT = "import time\nfrom raygym.testing import chaos\nbegan = time.monotonic()\nchaos.at('p')\n"


def test_a_kill_is_sigkill_and_is_noted(tmp_path: Path) -> None:
    process = run_in_child(Plan((Fault("p", "kill", hit=1),)), tmp_path, HIT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (fired,) = Claims(chaos.claims_folder(tmp_path / "chaos.json")).fired()
    assert (fired.kind, fired.pid) == ("kill", process.pid)


def test_a_stopped_process_is_continued(tmp_path: Path) -> None:
    program = HIT + "print(time.monotonic() - began, flush=True)\n"
    process = run_in_child(Plan((Fault("p", "stop", hit=1, seconds=0.5),)), tmp_path, program)
    # The system says it whenever it is asked, also when the process goes on by then.
    _, status = os.waitpid(process.pid, os.WUNTRACED | os.WCONTINUED)
    assert os.WIFSTOPPED(status) or os.WIFCONTINUED(status)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and float(output) >= 0.5


def test_a_process_that_stops_later_than_it_was_to_go_on_is_continued(tmp_path: Path) -> None:
    """As on a busy machine, where it gets no processor between the start of who continues it and its own stop."""
    program = """
import os, time
from raygym.testing import faults
now = os.kill
def late(*signal):
    time.sleep(1.0)
    now(*signal)
os.kill = late
faults.stop(0.0)
"""
    process = run_in_child(Plan(()), tmp_path, program)
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0


def test_who_continues_a_stopped_process_ends_with_it(tmp_path: Path) -> None:
    process = run_in_child(Plan((Fault("p", "stop", hit=1, seconds=600),)), tmp_path, HIT)
    stopped = psutil.Process(process.pid)
    wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED)
    (child,) = stopped.children()
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: is_gone(child))


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_memory_is_exhausted_up_to_the_limit_and_given_back(tmp_path: Path) -> None:
    program = f"""
import resource
from raygym.testing import chaos
def data():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((data() << 10) + (1 << 30), {resource.RLIM_INFINITY}))
before = data()
try:
    chaos.at("p")
except MemoryError as error:
    print(error, data() - before < 100 << 10)
"""
    process = run_in_child(Plan((Fault("p", "exhaust_memory", hit=1),)), tmp_path, program)
    output, _ = process.communicate(timeout=60)
    assert output == "chaos: no memory is left at p True\n"
    if resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.getrlimit(resource.RLIMIT_AS)[0] == -1:
        with (
            chaos.active(Plan((Fault("p", "exhaust_memory", hit=1),)), tmp_path / "here"),
            pytest.raises(MemoryError, match="chaos: no memory is left at p"),
        ):
            chaos.at("p")


def test_a_slow_point_is_slow(tmp_path: Path) -> None:
    with chaos.active(Plan((Fault("p", "slow", hit=1, seconds=0.2),)), tmp_path):
        began = time.monotonic()
        chaos.at("p")
        assert time.monotonic() - began >= 0.2


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = Plan((Fault("a", "kill", hit=3), Fault("b.*", "slow", rate=0.5, times=4, seconds=0.1)), seed=7)
    assert plan.environment(tmp_path / "plan.json") == {"RAYGYM_CHAOS": str(tmp_path / "plan.json")}
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"kind": "explode", "hit": 1}, "kind: 'explode' is none of kill, stop"),
        ({"kind": "kill"}, "either hit"),
        ({"kind": "kill", "hit": 1, "rate": 0.5}, "either hit"),
        ({"kind": "kill", "rate": 1.5}, "either hit"),
        ({"kind": "kill", "hit": 1, "times": 0}, "times and count of 1 or more"),
        ({"kind": "kill", "hit": 1, "often": 2}, "often.*with the keys point, kind, hit"),
    ],
)
def test_a_plan_that_is_none_is_told(tmp_path: Path, fault: dict[str, Any], told: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"faults": [{"point": "p", **fault}]}))
    with pytest.raises(ChaosPlanError, match=told) as raised:
        Plan.load(tmp_path / "plan.json")
    assert isinstance(raised.value, ConfigError), "the command line tells it in one line"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"faults": [1]}', '{"faults": [], "sed": 1}'])
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ChaosPlanError, match=r"RAYGYM_CHAOS: .*plan\.json is no plan of faults"):
        Plan.load(tmp_path / "plan.json")


def test_the_variable_is_handed_on_as_a_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert chaos.inherited({}) == {}
    monkeypatch.chdir(tmp_path)
    assert chaos.inherited({"RAYGYM_CHAOS": "plan.json", "HOME": "/"}) == {"RAYGYM_CHAOS": str(tmp_path / "plan.json")}


# A process that is called like one of Ray's, and two children that are.
FAMILY = """
import subprocess, sys, time
code = "import sys, time; print(flush=True); time.sleep(600)"
children = [subprocess.Popen(["ray::EnvRunner.exchange", "-c", code], executable=sys.executable) for _ in range(2)]
time.sleep(600)
"""


@pytest.fixture
def family() -> Any:
    process = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    wait_until(lambda: len(processes(process.pid, "ray::EnvRunner")) == 2)
    yield process.pid
    below = psutil.Process(process.pid).children()
    for member in [*below, process]:
        member.kill()
    process.communicate(timeout=60)


def test_a_monkey_kills_one_of_its_kind(family: int, tmp_path: Path) -> None:
    monkey = ChaosMonkey(family, tmp_path, seed=1, kinds=("env_runner",))
    assert monkey.strike("replica", "kill") is None, "there is none"
    fired = monkey.strike("env_runner", "kill")
    assert fired is not None and (fired.point, fired.kind) == ("monkey.env_runner", "kill")
    wait_until(lambda: len(processes(family, "ray::EnvRunner")) == 1)
    assert fired.pid not in [process.pid for process in processes(family, "ray::EnvRunner")]
    assert Claims(tmp_path).fired() == [fired]


def test_a_monkey_leaves_nobody_stopped(family: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"actions": ("stop",), "every_s": (0.01, 0.02), "stop_s": 600}
    with ChaosMonkey(family, tmp_path, seed=1, kinds=("env_runner",), **options):
        wait_until(lambda: any(p.status() == psutil.STATUS_STOPPED for p in processes(family, "ray::EnvRunner")))
    assert all(p.status() != psutil.STATUS_STOPPED for p in processes(family, "ray::EnvRunner"))
    assert [fired.kind for fired in Claims(tmp_path).fired()] == ["stop"]


def test_a_monkey_strikes_so_often_and_no_more(family: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"actions": ("stop",), "every_s": (0.01, 0.02), "stop_s": 0.01, "strikes": 3}
    with ChaosMonkey(family, tmp_path, seed=1, **options):
        wait_until(lambda: len(Claims(tmp_path).fired()) == 3)
        time.sleep(0.2)
    assert {fired.point for fired in Claims(tmp_path).fired()} == {"monkey.env_runner"}
    assert len(Claims(tmp_path).fired()) == 3


def test_a_monkey_knows_its_kinds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'driver' is none of replica, learner"):
        ChaosMonkey(1, tmp_path, seed=1, kinds=("driver",))
