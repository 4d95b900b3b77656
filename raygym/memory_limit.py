"""What a process may allocate: asking for more raises MemoryError at that place, and nothing else dies."""

from __future__ import annotations

import os
import re
import resource
import threading
from pathlib import Path

_MIB = 2**20


def limit_memory(mib: int) -> None:
    """Let this process, and each process that it starts, allocate `mib` MiB more than it has by now; 0 sets no limit.

    Counted are private writable pages, whether touched or not, so each thread's stack counts whole (8 MiB) unless it is
    allowed for. Shared memory, such as Ray's object store, does not count.
    """
    if not mib:
        return
    status = Path("/proc/self/status")
    if not status.is_file():  # only Linux enforces such a limit
        return
    found = re.search(r"^VmData:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    now = int(found[1]) * 1024 if found else 0
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = now + mib * _MIB
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def allow_stacks(threads: int) -> None:
    """Raise the limit, if there is one, by the stacks of so many threads that start; lower it for a negative number.

    Of a stack of 8 MiB a thread touches some KiB, and a thousand threads would use up the limit by their stacks alone.
    """
    with _changing:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft == resource.RLIM_INFINITY:
            return
        wanted = max(0, soft + threads * _STACK_BYTES)
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _stack_bytes() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    page = os.sysconf("SC_PAGE_SIZE")
    # Without a limit, glibc takes 2 MiB; to each it adds a page that nobody may touch.
    return (threading.stack_size() or (2 * _MIB if soft == resource.RLIM_INFINITY else soft)) + page


_STACK_BYTES = _stack_bytes()
_changing = threading.Lock()


def machine_memory_mib() -> int:
    """Physical memory of this machine, in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MIB
