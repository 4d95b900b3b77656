"""Nothing of a Ray cluster outlives who started it: `python -I -S cluster_guard.py ROOT PID GRACE_S KNOWN...`.

Ray leaves its session directory behind at every end, and a few of its processes for a while where the driver is killed.
This process, which needs the standard library only, waits for one byte on standard input, a pipe from the driver, or
for the driver's death. Then it ends what still writes below the session's directory, and removes that: all of it, or
all but the logs.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

REMOVE, KEEP_LOGS = b"r", b"k"
GRACE_S = 5.0
"""What a driver gives its cluster: Ray's processes end by themselves when their raylet is gone."""
_GIVE_UP_S = 30.0
_POLL_S = 0.1
KEPT = 5
"""Sessions whose logs are kept, the newest ones."""
_MARK = "kept-by-raygym"


def sessions_of(root: Path, driver: int) -> set[str]:
    """Names of the session directories below Ray's `root` that a process with this id has made."""
    return {path.name for path in root.glob(f"session_*_{driver}") if path.is_dir()}


def main(root: Path, driver: int, grace_s: float, known: Collection[str]) -> None:
    """Wait for the driver's order or death, then leave nothing of the sessions that it made since, but for logs.

    Args:
        root: Ray's directory of sessions.
        driver: the process id that stands in the names of its sessions.
        grace_s: what its processes get to end by themselves.
        known: sessions of an earlier process with the same id.
    """
    # A terminal's Ctrl-C reaches everybody; this process has to be the last one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Nothing comes when the driver was killed: its logs may say why.
    order = os.read(sys.stdin.fileno(), 1) or KEEP_LOGS
    for name in sorted(sessions_of(root, driver) - set(known)):
        end_writers(root / name, grace_s, driver)
        clear(root / name, keep_logs=order == KEEP_LOGS)
    forget_old(root)


def end_writers(folder: Path, grace_s: float, driver: int) -> None:
    """Wait `grace_s` for the processes that write below `folder`, then kill those that are left.

    The driver is spared, which may go on: Ray keeps the driver's own log open.
    """
    started = time.monotonic()
    while (found := set(writers(folder)) - {driver}) and time.monotonic() - started < grace_s + _GIVE_UP_S:
        if time.monotonic() - started >= grace_s:
            for pid in found:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def writers(folder: Path) -> list[int]:
    """Other processes that have a file below `folder` open for writing. Whoever only reads a log there is none."""
    found = []
    folder = Path(os.path.realpath(folder))  # as /proc has it, whatever link RAY_TMPDIR is
    for entry in os.scandir("/proc"):
        # What has ended meanwhile, and what is another user's.
        with suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid() and _writes_below(folder, Path(entry.path)):
                found.append(int(entry.name))
    return found


def _writes_below(folder: Path, process: Path) -> bool:
    for descriptor in os.scandir(process / "fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            if (
                os.readlink(descriptor.path).startswith(f"{folder}/")
                and os.lstat(descriptor.path).st_mode & stat.S_IWUSR
            ):
                return True
    return False


def clear(session: Path, *, keep_logs: bool) -> None:
    """Remove a session's directory, or all in it but the logs, and Ray's link to it."""
    if keep_logs:
        for entry in list(session.iterdir()):
            if entry.name != "logs":
                with suppress(OSError):  # whatever stays, the logs of later sessions must still be cleared
                    shutil.rmtree(entry, ignore_errors=True) if _is_folder(entry) else entry.unlink(missing_ok=True)
        (session / _MARK).touch()
        return
    shutil.rmtree(session, ignore_errors=True)
    latest = session.parent / "session_latest"
    with suppress(OSError):  # another cluster's start may replace it at this moment
        if latest.is_symlink() and not latest.exists():
            latest.unlink()


def _is_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink()


def forget_old(root: Path) -> None:
    """Keep the logs of the newest sessions that raygym left; their names begin with the time."""
    kept = sorted(mark.parent for mark in root.glob(f"session_*/{_MARK}"))
    for session in kept[:-KEPT]:
        shutil.rmtree(session, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
