"""One version of the weights as a safetensors file: which tensors it holds, and whether they are what was sent."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from raygym.weight_checksums import SummedCopy, sum_up
from raygym.weights import WeightsError


@contextmanager
def held_open(path: str) -> Iterator[str]:
    """Another path to the file, for all processes of this node, that stays good when whoever has written it ends.

    Raises:
        WeightsError: the file cannot be opened.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - an error inside the block is not one of opening
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}; whoever has written it is gone") from error
    with file:
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


@contextmanager
def mapped_tensors(path: str) -> Iterator[dict[str, memoryview]]:
    """The bytes of each tensor, by name, in the file's order. They are valid inside the block.

    Raises:
        WeightsError: the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}; whoever has written it is gone") from error
    with memory, memoryview(memory) as view:
        base = 8 + int.from_bytes(view[:8], "little")
        tensors = {}
        for name, entry in json.loads(bytes(view[8:base])).items():
            start, end = entry["data_offsets"]
            tensors[name] = view[base + start : base + end]
        try:
            yield tensors
        finally:
            for tensor in tensors.values():
                tensor.release()


def file_checksums(path: str) -> dict[str, int]:
    """The checksum of each tensor. Raises as `mapped_tensors` does."""
    with mapped_tensors(path) as tensors:
        return sum_up(SummedCopy(name, np.frombuffer(tensor, np.uint8)) for name, tensor in tensors.items())


def file_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def changed_tensors(path: str, sent: Mapping[str, int]) -> list[str]:
    """Names of the tensors that are not what was sent, by their checksums. Raises as `mapped_tensors` does."""
    found = file_checksums(path)
    return [name for name, checksum in sent.items() if found.get(name) != checksum]
