"""The Ray actor that holds the weights of one node, in memory that its learner and its replicas share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygym.delta_sending import apply_to_copy
from raygym.weight_slots import WeightSlots
from raygym.weights import Manifest, WeightsError, safetensors_header

logger = logging.getLogger(__name__)
# A receive may be hanging in a group of before while the next one is joined and somebody asks for a sign of life.
_THREADS = 8
_PULL_BYTES = 64 << 20


class WeightStore:
    """Two slots: the current version, from which replicas catch up, and the next one, which is being written.

    On the node of learner 0 it only owns the memory; on others it receives, as a member of the weight group.
    """

    def __init__(self, manifest: Manifest) -> None:
        """`slots` before anything else."""
        self._manifest = manifest
        self._group = ""

    def slots(self) -> tuple[list[str], int]:
        """Reserve the memory. For `OpenSlots`: paths, which are valid on this node, and where in them the data begins.

        Raises:
            WeightsError: there is too little.
        """
        self._slots = WeightSlots(safetensors_header(self._manifest), self._manifest.nbytes)
        # Not waited for: until it is done, a version takes longer to write and to map.
        threading.Thread(target=self._slots.use_huge_pages, name="huge-pages", daemon=True).start()
        return self._slots.paths, self._slots.base

    def ping(self) -> bool:
        """A sign of life."""
        return True

    def join(self, group_name: str, rank: int, world_size: int, timeout_s: float) -> None:
        """Become a member of the weight group, in place of any other. Raises CollectiveTimeout."""
        collective = _collective()
        collective.leave_group(self._group)
        self._group = ""
        collective.join_group(group_name, rank, world_size, timeout_s)
        self._group = group_name

    def receive(self, slot: int, buckets: Sequence[int], delta: bool = False) -> None:
        """Take these buckets of the next version from the group, each to its place.

        Args:
            slot: which; the other one holds the current version.
            buckets: their numbers.
            delta: they come as what has changed of the current version's. What is damaged leaves the bucket as it was,
                which whoever reads it finds out by its checksum.

        Raises:
            CollectiveTimeout: the sender or another member is gone or late.
        """
        import torch

        # One that is left over of a broken group must take nothing from the next, which may be joined meanwhile.
        collective, group = _collective(), self._group
        data = torch.frombuffer(self._slots.data(slot), dtype=torch.uint8)
        for number in buckets:
            bucket = self._manifest.buckets[number]
            if not delta:
                collective.broadcast_bytes(data[bucket.start : bucket.end], group)
                continue
            length = torch.empty(8, dtype=torch.uint8)
            collective.broadcast_bytes(length, group)
            message = torch.empty(int(length.view(torch.int64)), dtype=torch.uint8)
            collective.broadcast_bytes(message, group)
            held, into = (self._slots.data(which)[bucket.start : bucket.end] for which in (1 - slot, slot))
            try:
                apply_to_copy(message.numpy().data, held, into, self._manifest.dtype)
            except WeightsError as error:
                logger.warning("bucket %d: %s", number, error)

    def read(self, slot: int, start: int, end: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A part of a slot's data, for the store of a node that came later."""
        return np.frombuffer(self._slots.data(slot)[start:end], np.uint8)

    def pull(self, other: Any, slot: int, timeout_s: float) -> None:
        """Copy the whole slot of another node's store, through Ray's object store.

        Raises:
            RayError: the other one is gone; GetTimeoutError: it is late.
        """
        data = np.frombuffer(self._slots.data(slot), np.uint8)
        for start in range(0, self._manifest.nbytes, _PULL_BYTES):
            end = min(start + _PULL_BYTES, self._manifest.nbytes)
            data[start:end] = ray.get(other.read.remote(slot, start, end), timeout=timeout_s)


def _collective() -> ModuleType:
    """Of it, PyTorch takes a second to import; the driver, and the store of a run's only node, never need it."""
    from raygym.actors import collective

    return collective


def start_store(node: str, manifest: Manifest) -> Any:
    """Start the store of a node, given Ray's ID of it. Its memory goes with it, so Ray does not restart it."""
    actor: Any = ray.remote(WeightStore)
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": _THREADS, "scheduling_strategy": where}
    return actor.options(**options).remote(manifest)
