"""Memory that processes of one node share: each slot holds one version of the weights as a safetensors file.

The memory has no name in any file system. Others open it as `/proc/<pid>/fd/<number>` of the process that owns it, and
the kernel frees it when the last of them has ended, however it ended: nothing can be left behind, and the size that a
container gives to /dev/shm does not matter.
"""

from __future__ import annotations

import os

import psutil

from raygym.huge_pages import map_aligned, use_huge_pages
from raygym.weights import WeightsError

_SPARE = 256 << 20


class WeightSlots:
    """The owner's end: two slots, so that the current version stays whole while the next one is written."""

    COUNT = 2

    def __init__(self, header: bytes, nbytes: int) -> None:
        """Reserve the memory at once: a page that is touched for the first time costs four times a copy.

        Args:
            header: the first bytes of each slot.
            nbytes: of the data behind it.

        Raises:
            WeightsError: the machine has too little free memory.
        """
        size = len(header) + nbytes
        if psutil.virtual_memory().available < self.COUNT * size + _SPARE:
            need, have = self.COUNT * size >> 20, psutil.virtual_memory().available >> 20
            raise WeightsError(
                f"two versions of the weights take {need} MiB of shared memory on each node with a replica or learner "
                f"0, and {have} MiB are free; expected more memory, or a smaller policy.model"
            )
        self.base = len(header)
        """Where the data begins."""
        self._descriptors = [os.memfd_create(f"raygym-weights-{slot}", os.MFD_CLOEXEC) for slot in range(self.COUNT)]
        self._maps = []
        for descriptor in self._descriptors:
            os.posix_fallocate(descriptor, 0, size)
            self._maps.append(map_aligned(descriptor, size))
            self._maps[-1][: self.base] = header

    @property
    def paths(self) -> list[str]:
        """By which other processes of this node open the slots."""
        return [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self._descriptors]

    def data(self, slot: int) -> memoryview:
        """The data of a slot, without the header; writable."""
        return self._maps[slot][self.base :]

    def use_huge_pages(self) -> bool:
        """See `huge_pages.use_huge_pages`. Takes a while; the slots may be used meanwhile."""
        return all([use_huge_pages(view) for view in self._maps])

    def close(self) -> None:
        """Give the memory back; processes that have it open keep it until they end."""
        self._maps = []  # what still looks into them keeps them alive
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


class OpenSlots:
    """Somebody else's slots, writable."""

    def __init__(self, paths: list[str], base: int) -> None:
        """`paths` and `base` of a `WeightSlots`.

        Raises:
            WeightsError: their owner is gone.
        """
        self.base = base
        self._maps = []
        for path in paths:
            try:
                with open(path, "r+b") as file:
                    self._maps.append(map_aligned(file.fileno(), os.fstat(file.fileno()).st_size))
            except OSError as error:
                raise WeightsError(f"the weight store of this node is gone ({path}: {error.strerror})") from error

    def data(self, slot: int) -> memoryview:
        """The data of a slot, without the header; writable."""
        return self._maps[slot][self.base :]
