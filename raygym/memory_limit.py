"""What a process may allocate: asking for more raises MemoryError at that place, and nothing else dies."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

_MIB = 2**20


def limit_memory(mib: int) -> None:
    """Let this process, and each process that it starts, allocate `mib` MiB more than it has by now; 0 sets no limit.

    Counted are private writable pages, whether touched or not, so each thread's stack counts whole (8 MiB). Shared
    memory, such as Ray's object store, does not count.
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


def machine_memory_mib() -> int:
    """Physical memory of this machine, in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MIB
