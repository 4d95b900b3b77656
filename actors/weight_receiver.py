"""A replica's side of a weight update: receive one version into shared memory, checked."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch

from raygym.actors.collective import broadcast_bytes
from raygym.weights import Manifest, safetensors_header, tensor_checksum

# vLLM's worker processes read the version from here; a tmpfs, so no byte touches a disk.
_SHARED_MEMORY = Path("/dev/shm")


def receive_version(manifest: Manifest, group_name: str) -> tuple[Path, dict[str, int]]:
    """Receive all buckets into a new safetensors file in shared memory. Blocks; call it off the event loop.

    Returns:
        The file, which the caller removes, and each tensor's checksum as received.

    Raises:
        CollectiveTimeout: the sender or another member is gone or late. No file is left behind.
    """
    header = safetensors_header(manifest)
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    descriptor, name = tempfile.mkstemp(prefix="raygym-weights-", suffix=".safetensors", dir=folder)
    path = Path(name)
    try:
        os.ftruncate(descriptor, len(header) + manifest.nbytes)
        with mmap.mmap(descriptor, len(header) + manifest.nbytes) as memory:
            memory[: len(header)] = header
            checksums = _receive_buckets(memory, len(header), manifest, group_name)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return path, checksums


def _receive_buckets(memory: mmap.mmap, base: int, manifest: Manifest, group_name: str) -> dict[str, int]:
    checksums: dict[str, int] = {}
    version_bytes = torch.frombuffer(memory, dtype=torch.uint8, offset=base, count=manifest.nbytes)
    for bucket in manifest.buckets:
        broadcast_bytes(version_bytes[bucket.start : bucket.end], group_name)
        for tensor in bucket.tensors:
            checksums[tensor.name] = tensor_checksum(version_bytes[tensor.start : tensor.end].numpy())
    return checksums
