"""Shared memory in huge pages."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
from pathlib import Path

import pytest

from raygym.huge_pages import HUGE_PAGE, map_aligned, use_huge_pages


def shared_file(size: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC)
    os.posix_fallocate(descriptor, 0, size)
    return descriptor


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE + 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_two_maps_of_a_file_show_the_same(size: int) -> None:
    descriptor = shared_file(size)
    one, other = map_aligned(descriptor, size), map_aligned(descriptor, size)
    assert len(one) == size and address(one) % HUGE_PAGE == 0 == address(other) % HUGE_PAGE
    one[:] = bytes(i % 251 for i in range(size))
    use_huge_pages(one, chunk=HUGE_PAGE)
    assert other == one and os.pread(descriptor, size, 0) == bytes(one)
    other[size - 1] = 255
    assert one[size - 1] == 255
    os.close(descriptor)


def test_it_is_unmapped_with_its_last_view() -> None:
    descriptor = shared_file(HUGE_PAGE)
    begin = f"{address(view := map_aligned(descriptor, HUGE_PAGE)):x}-"
    part = view[7:]
    del view
    gc.collect()
    assert begin in Path("/proc/self/maps").read_text()
    part[0] = 1
    del part
    gc.collect()
    assert "memfd:test" not in Path("/proc/self/maps").read_text()
    os.close(descriptor)


def test_pages_are_huge_where_the_kernel_has_them() -> None:
    descriptor = shared_file(4 * HUGE_PAGE)
    view = map_aligned(descriptor, 4 * HUGE_PAGE)
    view[:] = b"x" * len(view)
    if not use_huge_pages(view):
        pytest.skip("this kernel gives no huge pages to shared memory")
    assert view[0] == view[-1] == ord("x")
    entry = Path("/proc/self/smaps").read_text().partition(f"{address(view):x}-")[2]
    assert int(re.search(r"ShmemPmdMapped:\s+(\d+) kB", entry)[1]) == 4 * HUGE_PAGE >> 10  # type: ignore[index]
    os.close(descriptor)


def test_a_file_that_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="mmap"):
        map_aligned(-1, 10)
