"""`raygym train` with simulated engines as a process, and what the machine has of it: processes, sockets, files."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from ray_head import PATIENCE
from test_train_command import COMMAND, ROOT, environment

from raygym.cluster_guard import sessions_of, writers

RAY = Path("/tmp/ray")
SHARED_MEMORY = Path("/dev/shm")
SIMULATED = [
    "policy.engine=simulated",
    "steps=100000",
    "checkpoint.save_final=false",
    "logging.tensorboard=false",
    "learner.threads=1",
]


class StartedRun:
    """One command, with all that it has started so far."""

    def __init__(self, folder: Path, *settings: str, command: str = "train", **variables: str) -> None:
        """Start it; what is said is read by a thread, so that it never waits for a reader."""
        self.folder = folder
        self.shared_memory = set(os.listdir(SHARED_MEMORY))
        self.output = ""
        patient = PATIENCE | {"TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": str(RAY.parent)}
        (folder / "tmp").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*COMMAND, command, str(ROOT / "configs/tiny.yaml"), f"runs_dir={folder}/runs", *SIMULATED, *settings],
            cwd=folder, env=environment(PYTHONPATH=str(ROOT), **patient, **variables),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self._known = sessions_of(RAY, self.process.pid)
        self._members: dict[int, psutil.Process] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    @property
    def session(self) -> Path | None:
        """Ray's directory of this run; None before there is one, or after it is gone."""
        names = sessions_of(RAY, self.process.pid) - self._known
        return RAY / max(names) if names else None

    def members(self) -> list[psutil.Process]:
        """Its processes that are alive, those included whose parents have ended meanwhile."""
        with suppress(psutil.Error):
            driver = psutil.Process(self.process.pid)
            self._members |= {member.pid: member for member in (driver, *driver.children(recursive=True))}
        if self.session is not None:
            for pid in writers(self.session):
                with suppress(psutil.Error):
                    self._members.setdefault(pid, psutil.Process(pid))
        return [member for member in self._members.values() if alive(member)]

    def wait_for(self, seen: Callable[[StartedRun], bool], timeout_s: float = 600) -> None:
        """Until `seen` holds, looking at its processes all the while."""
        deadline = time.monotonic() + timeout_s
        while not seen(self):
            self.members()
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {self.output}"
            time.sleep(0.1)

    def send(self, number: int) -> None:
        """A signal for the driver alone."""
        self.members()
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 400) -> int:
        """Its exit status; `output` is whole afterwards."""
        status = self.process.wait(timeout=timeout_s)
        self._reader.join(timeout=timeout_s)
        return status

    def left(self, timeout_s: float = 180) -> list[str]:
        """Processes that are there `timeout_s` after the driver's end."""
        _, staying = psutil.wait_procs(self.members(), timeout=timeout_s)
        return [describe(process) for process in staying if alive(process)]

    def close(self) -> None:
        """End what a failed test leaves."""
        for member in self.members():
            with suppress(psutil.Error):
                member.kill()
        self.process.wait(timeout=60)


@contextmanager
def started_run(folder: Path, *settings: str, command: str = "train", **variables: str) -> Iterator[StartedRun]:
    """A `StartedRun` that is ended in any case."""
    run = StartedRun(folder, *settings, command=command, **variables)
    try:
        yield run
    finally:
        run.close()


def step_was_made(step: int) -> Callable[[StartedRun], bool]:
    """Whether the run's ledger has this step."""

    def seen(run: StartedRun) -> bool:
        ledger = run.folder / "runs/tiny/ledger.jsonl"
        return ledger.exists() and f'{{"step": {step},' in ledger.read_text()

    return seen


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def describe(process: psutil.Process) -> str:
    """Its id and command line."""
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}".strip()
    except psutil.Error:
        return f"{process.pid}"


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    """Addresses and ports on which it accepts connections from this machine's network."""
    try:
        found = process.net_connections("tcp")
    except psutil.Error:
        return []
    return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]
