"""The Ray collective backend that carries weights: its own gloo process group on its own store.

Ray's GLOO backend lives in the process's default torch.distributed group, which DeepSpeed owns in a learner. This one
builds a separate group, so it works beside it. Members find each other through Ray's internal key-value store.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.util import collective
from ray.util.collective import types
from ray.util.collective.collective_group.base_collective_group import BaseGroup

from raygym.bound_store import bound_store, listen
from raygym.weights import CollectiveTimeout

# Typed as Any: the stubs of torch.distributed lack the store and process-group classes that it exports.
dist: Any = torch.distributed
BACKEND = "RAYGYM"
_NAMESPACE = b"raygym-collective"
_REDUCE_OPS = {
    types.ReduceOp.SUM: dist.ReduceOp.SUM,
    types.ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
    types.ReduceOp.MIN: dist.ReduceOp.MIN,
    types.ReduceOp.MAX: dist.ReduceOp.MAX,
}


class GlooGroup(BaseGroup):
    """One member's end of a group. Every operation waits at most `timeout_s`, then raises."""

    timeout_s: float = 60.0
    """Deadline of rendezvous and of each operation; set by `join_group` before Ray constructs the group."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self._deadline = timedelta(seconds=self.timeout_s)
        self._key = f"{group_name}".encode()
        self._tcp_store = self._open_store() if rank == 0 else self._find_store()
        try:
            self._group = self._connect()
        except BaseException:  # a group that never was is not destroyed, and its key would stay with the cluster
            self._forget_store()
            raise

    def _connect(self) -> Any:
        store = dist.PrefixStore(self.group_name, self._tcp_store)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = self._deadline
        # By default it listens where the machine's name leads, which is its loopback interface on many.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address())]
        return dist.ProcessGroupGloo(store, self.rank, self.world_size, options)

    def _open_store(self) -> Any:
        listening = listen(ray.util.get_node_ip_address())
        host, port = listening.getsockname()[:2]
        store = bound_store((host, port), self.world_size, self._deadline, listening)
        record = json.dumps({"host": host, "port": port}).encode()
        _internal_kv_put(self._key, record, overwrite=True, namespace=_NAMESPACE)
        return store

    def _find_store(self) -> Any:
        deadline = time.monotonic() + self.timeout_s
        while not (record := _internal_kv_get(self._key, namespace=_NAMESPACE)):
            if time.monotonic() > deadline:
                raise CollectiveTimeout(
                    f"group {self.group_name}: rank 0 (the learner) did not open its store within {self.timeout_s} s"
                )
            # Rank 0 opens its store in milliseconds; this loop runs once per group and member.
            time.sleep(0.02)
        where = json.loads(record)
        return bound_store((where["host"], where["port"]), self.world_size, self._deadline)

    def _forget_store(self) -> None:
        if self.rank == 0:
            _internal_kv_del(self._key, namespace=_NAMESPACE)

    @classmethod
    def backend(cls) -> str:
        """The name under which Ray knows this backend."""
        return BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Whether this build of PyTorch has gloo."""
        return bool(dist.is_gloo_available())

    def destroy_group(self) -> None:
        """Close the connections; rank 0 also removes the key by which it was found."""
        self._forget_store()
        self._group.shutdown()
        del self._group, self._tcp_store

    def broadcast(self, tensor: list[torch.Tensor], broadcast_options: Any = None) -> None:
        """Copy the root's tensor into everybody else's, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = broadcast_options.root_rank if broadcast_options else 0
        options.timeout = self._deadline
        self._group.broadcast(tensor, options).wait(self._deadline)

    def allreduce(self, tensor: list[torch.Tensor], allreduce_options: Any = None) -> None:
        """Reduce in place on every member."""
        options = dist.AllreduceOptions()
        options.reduceOp = _REDUCE_OPS[allreduce_options.reduceOp if allreduce_options else types.ReduceOp.SUM]
        self._group.allreduce(tensor, options).wait(self._deadline)

    def reduce(self, tensor: list[torch.Tensor], reduce_options: Any = None) -> None:
        """Reduce in place on the root."""
        options = dist.ReduceOptions()
        options.reduceOp = _REDUCE_OPS[reduce_options.reduceOp if reduce_options else types.ReduceOp.SUM]
        options.rootRank = reduce_options.root_rank if reduce_options else 0
        self._group.reduce(tensor, options).wait(self._deadline)

    def allgather(
        self, tensor_list: list[list[torch.Tensor]], tensor: list[torch.Tensor], allgather_options: Any = None
    ) -> None:
        """Every member's tensor, in rank order, on every member."""
        self._group.allgather(tensor_list, tensor).wait(self._deadline)

    def reducescatter(
        self, tensor: list[torch.Tensor], tensor_list: list[list[torch.Tensor]], reducescatter_options: Any = None
    ) -> None:
        """Reduce a list of tensors and keep the one at this member's rank."""
        operation = reducescatter_options.reduceOp if reducescatter_options else types.ReduceOp.SUM
        for shares in tensor_list:
            options = dist.AllreduceOptions()
            options.reduceOp = _REDUCE_OPS[operation]
            for share in shares:
                self._group.allreduce([share], options).wait(self._deadline)
        for mine, shares in zip(tensor, tensor_list, strict=True):
            mine.copy_(shares[self.rank])

    def send(self, tensor: list[torch.Tensor], send_options: Any) -> None:
        """Point to point."""
        self._group.send(tensor, send_options.dst_rank, 0).wait(self._deadline)

    def recv(self, tensor: list[torch.Tensor], recv_options: Any) -> None:
        """Point to point, in place."""
        self._group.recv(tensor, recv_options.src_rank, 0).wait(self._deadline)

    def barrier(self, barrier_options: Any = None) -> None:
        """Wait until every member is here."""
        self._group.barrier().wait(self._deadline)


def join_group(group_name: str, rank: int, world_size: int, timeout_s: float) -> None:
    """Make the calling actor a member. Blocks until all are there; call it off the event loop.

    Raises:
        CollectiveTimeout: somebody is missing after `timeout_s`.
    """
    if not collective.is_backend_available(BACKEND):
        collective.register_collective_backend(BACKEND, GlooGroup)
    GlooGroup.timeout_s = timeout_s
    try:
        collective.init_collective_group(world_size, rank, types.Backend(BACKEND), group_name)
    except RuntimeError as error:
        raise CollectiveTimeout(
            f"group {group_name}: member {rank} of {world_size} could not connect to the others "
            f"within {timeout_s} s ({error})"
        ) from error


def leave_group(group_name: str) -> None:
    """Give up membership; nothing happens where the caller is no member."""
    if collective.is_group_initialized(group_name):
        collective.destroy_collective_group(group_name)


def broadcast_bytes(buffer: torch.Tensor, group_name: str) -> None:
    """Send (rank 0) or receive (others) one flat uint8 tensor in place.

    Raises:
        CollectiveTimeout: a member did not take part in time, or is gone.
    """
    try:
        collective.broadcast(buffer, 0, group_name)
    except RuntimeError as error:
        raise CollectiveTimeout(f"group {group_name}: a broadcast of {buffer.numel()} bytes failed: {error}") from error
