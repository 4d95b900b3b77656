"""The machine itself: cores, memory, shared memory, limits of a process, disk, clock."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from raygym.doctor.finding import Finding, ok, problem, warning

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
_FEW_BYTES, _TOO_FEW_BYTES = 8 * _GIB, 4 * _GIB
"""Of memory that is free: Ray, an engine and a learner of the demo's policy need something between them."""
_RAY_SHARE, _RAY_LEAST_CAP = 0.3, 10**10
"""Of the memory, for Ray's object store, which /dev/shm bounds only above this many bytes."""
_FEW_FILES, _FEW_PROCESSES = 8192, 4096
_LOW_DISK, _FULL_DISK, _RAY_FULL = 10 * _GIB, 2 * _GIB, 0.95
_LONGEST_RAY_DIRECTORY = 40
"""Ray puts Unix sockets, whose paths may have 107 characters, 66 below it."""
_CLOCK_AHEAD_S = 86400.0


def cores() -> Iterator[Finding]:
    """Cores that this process may use, and whether they are busy."""
    usable = float(len(os.sched_getaffinity(0)))
    quota = _read(_CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        usable = min(usable, int(quota[0]) / int(quota[1]))
    text = f"{usable:g} of {os.cpu_count()}"
    load = os.getloadavg()[0]
    if usable < 2:
        yield warning("cores", text, "give it two or more: engine, learner and environments share them")
    elif load > 2 * usable:
        yield warning(
            "cores", f"{text}, load {load:.0f}", "other work keeps them busy: starts may exceed their deadlines"
        )
    else:
        yield ok("cores", f"{text}, load {load:.1f}")


def memory() -> Iterator[Finding]:
    """Memory that a run may take, by the machine or its container."""
    total, free = _memory()
    text = f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}"
    if free < _TOO_FEW_BYTES:
        yield problem("memory", text, "stop other programs or take a larger machine; the demo needs some 4 to 8 GiB")
    elif free < _FEW_BYTES:
        yield warning("memory", text, "enough for small policies at most; stop other programs before a run")
    else:
        yield ok("memory", text)


def shared_memory() -> Iterator[Finding]:
    """/dev/shm beside what Ray's object store will take of it."""
    free = shutil.disk_usage("/dev/shm").free
    wanted = min(_RAY_SHARE * _memory()[0], max(_RAY_LEAST_CAP, 0.95 * free))
    text = f"{free / _GIB:.1f} GiB free in /dev/shm, Ray's object store takes up to {wanted / _GIB:.1f}"
    if free < wanted:
        size = -(-int(wanted) // _GIB)
        advice = f"the rest goes to disk, slowly; in a container: docker run --shm-size={size}g; else enlarge /dev/shm"
        yield warning("shared memory", text, advice)
    else:
        yield ok("shared memory", text)


def limits() -> Iterator[Finding]:
    """Files and processes that this user may have at once."""
    # Ray raises the soft limit to the hard one by itself.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= files < _FEW_FILES:
        yield warning("open files", f"at most {files}", f"allow {_FEW_FILES} or more (ulimit -Hn, limits.conf)")
    else:
        yield ok("open files", "no limit" if files < 0 else f"at most {files}")
    most = [resource.getrlimit(resource.RLIMIT_NPROC)[1]]
    if (allowed := _read(_CGROUP / "pids.max")).isdigit():
        most.append(int(allowed))
    processes = min((count for count in most if count >= 0), default=-1)
    if 0 <= processes < _FEW_PROCESSES:
        advice = f"allow {_FEW_PROCESSES} or more (ulimit -Hu; docker run --pids-limit): threads count as well"
        yield warning("processes", f"at most {processes}", advice)
    else:
        yield ok("processes", "no limit" if processes < 0 else f"at most {processes}")


def disk() -> Iterator[Finding]:
    """Room and permission where a run writes: its own folder, Ray's, the cache of policies."""
    cache = Path(os.environ.get("RAYGYM_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    ray = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    for name, path in (("disk, runs", Path.cwd()), ("disk, Ray", ray), ("disk, cache", cache)):
        yield _room(name, path.expanduser())
    if len(str(ray.resolve())) > _LONGEST_RAY_DIRECTORY:
        advice = f"set RAY_TMPDIR to one of at most {_LONGEST_RAY_DIRECTORY} characters: Ray's sockets lie below it"
        yield problem("Ray's folder", f"{ray} is too long a path", advice)


def _room(name: str, path: Path) -> Finding:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    if not os.access(there, os.W_OK):
        return problem(name, f"{path} cannot be written", "change its permissions, or use another folder")
    usage = shutil.disk_usage(there)
    text = f"{usage.free / _GIB:.1f} GiB free at {path}"
    if usage.free < _FULL_DISK:
        return problem(name, text, "free some space: a run waits on a full disk, and then ends")
    if name == "disk, Ray" and usage.used > _RAY_FULL * usage.total:
        advice = "Ray spills nothing to a disk that is 95 % full; free some, or set RAY_TMPDIR to another disk"
        return warning(name, f"{text}, {usage.used / usage.total:.0%} used", advice)
    if usage.free < _LOW_DISK:
        return warning(name, text, "enough for small policies; a checkpoint of a policy takes 16 bytes a parameter")
    return ok(name, text)


def clock() -> Iterator[Finding]:
    """Whether the clock can be right: nothing was written after now."""
    now = time.time()
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if newest > now + _CLOCK_AHEAD_S:
        yield problem(
            "clock", f"{text}, before raygym's own files were written", "set the clock (timedatectl set-ntp true)"
        )
    else:
        yield ok("clock", text)


def _memory() -> tuple[int, int]:
    """Bytes in all, and free: of the machine, or of the container where that is less."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    values = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    total, free = values["MemTotal"], values["MemAvailable"]
    most, now = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if most.isdigit() and now.isdigit():
        # The files that a container has read count as its memory, and give way.
        lines = (line.split() for line in _read(_CGROUP / "memory.stat").splitlines())
        gives_way = sum(int(words[1]) for words in lines if words[0] == "inactive_file")
        total, free = min(total, int(most)), min(free, int(most) - int(now) + gives_way)
    return total, free


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
