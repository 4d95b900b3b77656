"""What shuts a program in, with the standard library alone. Runs in the supervisor and its fork only."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

NOBODY = 65534
_LIBC = ctypes.CDLL(None, use_errno=True)

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522

_PROCESS_EVENTS = frozenset(
    ["os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen", "pty.spawn"]
)
_SIGNAL_EVENTS = frozenset(["os.kill", "os.killpg", "signal.pthread_kill"])
_PATH_EVENTS = frozenset(
    f"os.{name}"
    for name in ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod", "chown", "utime")
) | {"os.setxattr", "os.removexattr", "os.chdir"}
_LISTING_EVENTS = frozenset(["os.listdir", "os.scandir"])


def enter_namespaces() -> None:
    """Cut this process off the network, and give the children that it will fork process IDs of their own.

    The file system stays common until a child calls `change_root`: what is mounted there must not be in the way of the
    supervisor's cleaning up.

    Raises:
        OSError: the kernel does not permit it.
    """
    flags = _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    if os.geteuid() == 0:
        _check(_LIBC.unshare(flags), "unshare")
        return
    uid, gid = os.geteuid(), os.getegid()
    _check(_LIBC.unshare(flags | _CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def adopt_orphans() -> None:
    """Make this process the parent of all descendants whose own parent ends, also of daemons."""
    _check(_LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def change_root(directory: str, file_bytes: int) -> None:
    """Change to a file system of this process's own, read-only, with Python's library and a /tmp of `file_bytes`.

    Args:
        directory: an empty directory to build it in.
        file_bytes: size of /tmp.

    Raises:
        OSError: the kernel does not permit it.
    """
    _check(_LIBC.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", directory, "tmpfs", _MS_NOSUID, "size=1m,mode=0755")
    libraries = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib"]
    for path in [*libraries, "/usr/share/zoneinfo", *python_paths()]:
        _show(path, directory)
    for path in ("/dev/null", "/dev/zero", "/dev/urandom"):
        os.makedirs(os.path.dirname(directory + path), exist_ok=True)
        os.close(os.open(directory + path, os.O_CREAT))
        _mount(path, directory + path, None, _MS_BIND)
    for name in ("/tmp", "/proc"):
        os.mkdir(directory + name)
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    changed = _LIBC.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, directory.encode(), _AT_RECURSIVE, attributes, len(attributes)
    )
    _check(changed, "mount_setattr")
    _mount("tmpfs", directory + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={file_bytes},nr_inodes=1024,mode=1777")
    # Containers that mask parts of /proc permit no new one; the program does without.
    with suppress(OSError):
        _mount("proc", directory + "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY)
    os.chroot(directory)
    os.chdir("/tmp")


def python_paths() -> list[str]:
    """Where this interpreter's library and the shared libraries beside it are."""
    return [os.path.dirname(os.path.dirname(os.path.realpath(os.__file__)))]


def become_nobody() -> None:
    """Give up root's identity, where this process has it, and all capabilities for good."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = struct.pack("Ii", _CAPABILITY_VERSION_3, 0), struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
    _check(_LIBC.capset(header, none), "capset")
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def die_with_parent(heard: int) -> None:
    """Be killed when the parent ends; end now if it has. To be called after the last change of user: that forgets it.

    Args:
        heard: the writing end of a pipe whose reading end nobody but the parent holds: the kernel says nothing of a
            parent that ended before it was asked, and in a namespace of its own a process cannot see its parent's ID.
    """
    _check(_LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    listener = select.poll()
    listener.register(heard, 0)
    if listener.poll(0):
        os._exit(1)


def set_limits(limits: Mapping[str, Any]) -> None:
    """The kernel's limits, none of which can be raised again."""
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory_mib"] << 20,
        resource.RLIMIT_FSIZE: limits["file_mib"] << 20,
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for what, limit in wanted.items():
        hard = resource.getrlimit(what)[1]
        least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (least, least))


def audit_hook(writable: str, processes: bool) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook for `sys.addaudithook` that refuses what a program has no business with, in words.

    Args:
        writable: the only directory in which files may be made or changed.
        processes: whether it may start processes.
    """
    readable = (writable, *python_paths(), *(os.path.realpath(path) for path in sys.path))
    devices = ("/dev/null", "/dev/zero", "/dev/urandom")
    zones = "/usr/share/zoneinfo"
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    # Bound now: the program can change what the modules' names mean.
    realpath, fsdecode, own, unix = os.path.realpath, os.fsdecode, os.getpid(), 1
    types = (str, bytes, os.PathLike)

    def inside(path: Any, *directories: str) -> bool:
        if not isinstance(path, types):
            return True  # a descriptor that it already has
        real = realpath(fsdecode(path))
        return real in devices or any(real == d or real.startswith(d + "/") for d in directories)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            changes = bool(flags & writing) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
            allowed = inside(path, writable) if changes else inside(path, *readable, zones)
        elif event in _PATH_EVENTS:
            allowed = all(inside(arg, writable) for arg in args)
        elif event in _LISTING_EVENTS:
            allowed = inside("." if args[0] is None else args[0], *readable)
        elif event == "socket.__new__":
            allowed = args[1] == unix  # a pair of them is what asyncio's loop wakes itself up with
        elif event in _PROCESS_EVENTS:
            allowed = processes
        elif event in _SIGNAL_EVENTS:
            allowed = processes or args[0] == own
        else:
            allowed = not event.startswith(("socket.", "ctypes."))
        if not allowed:
            raise PermissionError(f"not allowed here: {event}")

    return hook


def _show(path: str, root: str) -> None:
    """Bind `path` to the same place below `root`, or copy it where it is a link."""
    if not os.path.isdir(path) or os.path.lexists(root + path):
        return
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), root + path)
    else:
        os.mkdir(root + path)
        _mount(path, root + path, None, _MS_BIND | _MS_REC)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _check(_LIBC.mount(*encoded, ctypes.c_ulong(flags), data and data.encode()), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
