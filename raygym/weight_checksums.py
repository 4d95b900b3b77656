"""Checksums of weights, piece by piece: one large tensor is summed up, and copied, by several threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]

PIECE_BYTES = 1 << 20
"""A part of every checksum: one that fits a core's cache, so that copying it after summing it up reads no memory."""
_THREADS = min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class SummedCopy:
    """One tensor to be summed up."""

    name: str
    target: Bytes
    """All of its bytes."""
    source: Bytes | None = None
    """Copied to `target` on the way, and what is summed up; None: they are there already."""


def bytes_checksum(data: Any) -> int:
    """XXH3 (64 bits) of any C-contiguous buffer: six times as fast as CRC-32, twice a copy."""
    return int(xxhash.xxh3_64_intdigest(data))


def tensor_checksum(data: Any) -> int:
    """Of one tensor's bytes (any C-contiguous buffer).

    That of its only piece, or of the checksums of its pieces, 64 bits each, in little-endian order.
    """
    whole = np.frombuffer(data, np.uint8) if len(memoryview(data).cast("B")) else np.empty(0, np.uint8)
    return _of_pieces(np.array([bytes_checksum(piece) for piece in _pieces(whole)], "<u8"))


def sum_up(tensors: Iterable[SummedCopy]) -> dict[str, int]:
    """Name -> the `tensor_checksum` of each, by several threads; what has a source is copied."""
    digests: dict[str, npt.NDArray[np.uint64]] = {}
    jobs: list[tuple[npt.NDArray[np.uint64], int, Bytes, Bytes | None]] = []
    for tensor in tensors:
        targets = list(_pieces(tensor.target))
        sources: list[Bytes | None] = [None] * len(targets)
        if tensor.source is not None:
            assert tensor.source.shape == tensor.target.shape, tensor.name
            sources = list(_pieces(tensor.source))
        found = digests[tensor.name] = np.empty(len(targets), "<u8")
        jobs += [(found, i, *both) for i, both in enumerate(zip(targets, sources, strict=True))]
    waiting = iter(jobs)  # of a list: each thread gets the next of it

    def work() -> None:
        for found, index, target, source in waiting:
            found[index] = bytes_checksum(target if source is None else source)
            if source is not None:
                np.copyto(target, source)

    others = [_pool().submit(work) for _ in range(min(_THREADS, len(jobs)) - 1)]
    work()
    for future in others:
        future.result()
    return {name: _of_pieces(found) for name, found in digests.items()}


@cache
def _pool() -> ThreadPoolExecutor:
    """Kept: in a process as large as a learner, threads take as long to start as a bucket takes to be copied."""
    return ThreadPoolExecutor(max(1, _THREADS - 1), "weight-checksums")


def model_checksum(tensors: Mapping[str, int]) -> str:
    """One digest of a whole version from its tensors' checksums; independent of the order of the tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name]:016x};".encode())
    return digest.hexdigest()


def _pieces(data: Bytes) -> Iterator[Bytes]:
    """At least one, which may be empty."""
    for start in range(0, max(1, len(data)), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _of_pieces(digests: npt.NDArray[np.uint64]) -> int:
    return int(digests[0]) if len(digests) == 1 else bytes_checksum(digests)
