"""When processes of this machine that somebody else ends are gone."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_POLL_S = 0.02


def wait_ended(pids: Collection[int], timeout_s: float) -> bool:
    """Return when none of these processes runs any more. Whether that is so, after `timeout_s` seconds at most."""
    ends = time.monotonic() + timeout_s
    while any(_runs(pid) for pid in pids):
        if time.monotonic() >= ends:
            return False
        time.sleep(_POLL_S)
    return True


def _runs(pid: int) -> bool:
    if not Path("/proc/self/task").exists():
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return True
    # Of all threads: the first one may have ended while another still writes.
    with suppress(OSError):
        return any(_thread_runs(task) for task in Path(f"/proc/{pid}/task").iterdir())
    return False


def _thread_runs(task: Path) -> bool:
    with suppress(OSError):
        # Behind the name, which may hold anything. A zombie does nothing more, whoever waits for it.
        return (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    return False
