"""Lock files that a killed compile of a torch extension has left behind.

PyTorch compiles an extension under a lock file and removes it afterwards. If the process is killed meanwhile the file
stays, and every later process that needs the extension waits for it without end and without a word.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import signal
import time
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs", "apfs", "bcachefs", "ramfs"}
# Of another rank that asks at the same time: it has the file open for some microseconds.
_ASK_TIMES, _ASK_WITHIN_S = 10, 0.05
# No extension of ours takes a tenth of it, and on a file system of several machines nobody sees who holds a lock.
_SURELY_OVER_S = 3600.0


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove what no compile holds; call it before an extension is loaded.

    Whoever compiles keeps the file open, so one that no process of this machine has open is stale, whichever container
    the process is in. On a file system that other machines may write to, it must also be an hour old.

    Args:
        folder: where torch keeps its extensions.

    Returns:
        The files that were removed.
    """
    removed = []
    for lock, status in _stale(folder):
        # Not the lock of a rank that has removed the stale one first, and compiles now.
        if (now := _status(lock)) and now.st_mtime_ns == status.st_mtime_ns:
            lock.unlink(missing_ok=True)
            logger.warning("removed %s: a compile that was killed had left it, and loading would wait for it", lock)
            removed.append(lock)
    return removed


def stale_locks(folder: Path) -> list[Path]:
    """What `remove_stale_locks` would remove."""
    return [lock for lock, _ in _stale(folder)]


def _stale(folder: Path) -> list[tuple[Path, os.stat_result]]:
    locks = {lock: status for lock in folder.glob("**/lock") if (status := _status(lock))}
    if not locks:
        return []
    held = _open_files()
    found = []
    for lock, status in locks.items():
        if (status.st_dev, status.st_ino) in held:
            continue
        old = time.time() - status.st_mtime > _SURELY_OVER_S
        if not _is_open_out_of_sight(lock) if _is_local(lock) else old:
            found.append((lock, status))
    return found


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # its compile is done
        return None


def _open_files() -> set[tuple[int, int]]:
    """Device and inode of what processes of this machine have open, as far as we may look."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        if status := _status(descriptor):
            found.add((status.st_dev, status.st_ino))
    return found


def _is_open_out_of_sight(path: Path) -> bool:
    """Whether a process has it open that /proc does not show: of another container, which has PIDs of its own.

    The kernel knows: it gives a write lease of a file only while nobody else has that open. Where it gives none at
    all (a file of another user, some file systems), only what /proc shows is known.
    """
    for _ in range(_ASK_TIMES):
        try:
            with path.open("rb") as file:
                # Whoever opens it meanwhile waits, and we get a signal, whose default is to end the process.
                fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            return False  # closing has given it back
        except BlockingIOError:
            time.sleep(random.uniform(0.0, _ASK_WITHIN_S))
        except (OSError, AttributeError):  # AttributeError: another system than Linux
            return False
    return True


def _is_local(path: Path) -> bool:
    """The file system that it is on is of this machine alone."""
    mounted = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounted[folder] in _LOCAL for folder in path.resolve().parents if folder in mounted), False)
