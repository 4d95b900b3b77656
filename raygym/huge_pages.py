"""Shared memory in huge pages: a copy faults once in 2 MiB instead of 4 KiB, and mapping it costs next to nothing.

Linux gives none to shared memory by itself, and has to be asked for each. Where it has none to give, or is older than
6.1, the pages stay small and everything works as well.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from functools import cache

logger = logging.getLogger(__name__)
HUGE_PAGE = 2 << 20
_MAP_FIXED = 0x10
_MADV_COLLAPSE = 25


def map_aligned(descriptor: int, size: int) -> memoryview:
    """Map a file, shared and writable, at an address at which huge pages fit. Unmapped when the last view is gone.

    Raises:
        OSError: it cannot be mapped.
    """
    # Python's mmap chooses no address: the file replaces a part of a mapping in which one that fits must be.
    reserved = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skipped = -_address(memoryview(reserved)) % HUGE_PAGE
    view = memoryview(reserved)[skipped : skipped + size]
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    mapped = _libc().mmap(_address(view), size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    if mapped != _address(view):
        raise _error("mmap")
    return view


def use_huge_pages(view: memoryview, chunk: int = 16 * HUGE_PAGE) -> bool:
    """Move a whole view of `map_aligned` into huge pages; whether all of it is. What it holds may be used meanwhile.

    Takes as long as a copy or two; `chunk` bytes at a time, so that others can map and unmap in between.
    """
    start, size = _address(view), len(view) - len(view) % HUGE_PAGE
    for offset in range(0, size, chunk):
        if _libc().madvise(start + offset, min(chunk, size - offset), _MADV_COLLAPSE):
            error = _error("madvise")
            # Not known to this kernel, or not there at the moment.
            expected = error.errno in (errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY)
            logger.log(logging.DEBUG if expected else logging.WARNING, "no huge pages: %s", error)
            return False
    return True


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    number, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.restype, libc.mmap.argtypes = pointer, [pointer, size, number, number, number, ctypes.c_int64]
    libc.madvise.argtypes = [pointer, size, number]
    return libc
