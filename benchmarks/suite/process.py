"""One benchmark in a process of its own, with a time limit, whatever it does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness.result import Result, ResultError, Skipped, parse_result

from suite.outcomes import Outcome

GRACE_S = 40.0
"""To stop everything after an interrupt, before it is killed."""
_SETTLED = 0.25
"""Part of it for what the killed ones have started, such as a Ray cluster, to end by itself."""
_POLL_S = 0.05
_SHOWN_LINES = 3


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of it."""

    outcome: Outcome
    result: Result | None


def run_benchmark(
    name: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    logs: Path,
    limit_s: float,
    grace_s: float = GRACE_S,
) -> Ended:
    """Run it to its end, or to its limit.

    Args:
        name: what its result must be of.
        command: the whole of it.
        environment: all variables.
        folder: where it runs.
        logs: where what it prints is kept, as `<name>.out` and `<name>.err`.
        limit_s: then it is interrupted.
        grace_s: so long after that it is killed, with all that it has started and that is still there.

    Raises:
        KeyboardInterrupt: the caller was interrupted; the benchmark has ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    out, err = logs / f"{name}.out", logs / f"{name}.err"
    # Files, since a process that outlives the benchmark would keep a pipe open.
    with out.open("wb") as stdout, err.open("wb") as stderr:
        started = time.monotonic()
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            # A group of its own, which can be ended as a whole.
            start_new_session=True,
        )
        over = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            over = True
            interrupt(process, grace_s)
        except BaseException:
            interrupt(process, grace_s)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - started
    times = {"seconds": round(seconds, 1), "limit_s": limit_s}
    if over:
        return Ended(Outcome(status="over", why=f"it took more than {limit_s:.0f} s; see {err.name}", **times), None)
    if process.returncode:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
        return Ended(Outcome(status="failed", why=f"{how}: {_last_words(err)}", **times), None)
    return _ended_well(name, out, times)


def _ended_well(name: str, out: Path, times: Mapping[str, Any]) -> Ended:
    lines = out.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        return Ended(Outcome(status="failed", why="it printed nothing; expected one line of JSON", **times), None)
    try:
        found = parse_result(lines[-1], "its last line")
    except ResultError as error:
        return Ended(Outcome(status="failed", why=str(error), **times), None)
    if found.name != name:
        why = f"its last line is a result of {found.name}; expected one of {name}"
        return Ended(Outcome(status="failed", why=why, **times), None)
    if isinstance(found, Skipped):
        return Ended(Outcome(status="skipped", why=found.skipped, **times), None)
    return Ended(Outcome(status="done", **times), found)


def interrupt(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """As Ctrl-C would, so that it stops its cluster and its servers; then kill what is left.

    Some of what it has started is in sessions of its own, such as NeMo Gym's servers. And a run of `raygym train` may
    take longer to end than the benchmark that is interrupted while it waits for it.
    """
    ends = time.monotonic() + grace_s
    family = _started_by(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    family |= _started_by(process.pid)
    _wait(family, ends)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _wait(family, time.monotonic() + _SETTLED * grace_s)
    for one in family:
        with suppress(psutil.Error):
            one.kill()


def _started_by(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()  # it has ended


def _wait(processes: Iterable[psutil.Process], until_s: float) -> None:
    """Until all of them have ended, or until then by the monotonic clock."""
    while any(map(_is_alive, processes)) and time.monotonic() < until_s:
        time.sleep(_POLL_S)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _last_words(err: Path) -> str:
    lines = [line.strip() for line in err.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-_SHOWN_LINES:])[-400:] or "it said nothing"
